"""One LoRA fitted to a routed pool, against what the mathematics says it is."""

import pytest
import torch
from helpers.common import close
from helpers.tiny import tiny_model

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.data.batches import collate
from remix_cli.export.nearest_lora import applied, calibrate, merge, merge_pool, price

IDS = torch.tensor([[5, 9, 22, 7, 31, 8], [4, 4, 17, 40, 3, 12]])


def pool(active, seed=0):
    model = tiny_model(dtype=torch.float64)
    adapter = apply_adapter(model, AdapterConfig(pool_size=4, active=active, rank=3), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in adapter.parameters().items():
            if not name.endswith("lora_A"):
                p.copy_(torch.randn(p.shape, generator=generator) * (3.0 if name.endswith("router") else 0.3))
    return model, adapter


def batches(count=6):
    from remix_cli.data.rows import EncodedRow

    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(2, 60, (20 + i,), generator=generator).numpy() for i in range(count)]
    return [collate([EncodedRow(row, row > 5, "t") for row in rows[i : i + 2]]) for i in range(0, count, 2)]


def test_where_every_lora_is_on_the_merged_lora_is_exact():
    model, adapter = pool(active=4)
    merged = merge_pool(model, adapter, batches(), rank=12)
    cost = price(model, adapter, merged, batches())
    # the merged LoRA is kept in float32; in float32 the KL itself would be known to 1e-8, of either sign
    assert abs(cost["KL(routed, approximation) in nats a token"]) < 1e-12
    assert cost["loss of this approximation"] == pytest.approx(cost["loss of the routed model"], abs=1e-6)


def test_the_fit_is_the_least_squares_one_and_a_rank_takes_its_best_part():
    """Against the normal equations solved for the whole matrix; a smaller rank is never better."""
    model, adapter = pool(active=2)
    name, linear = next(iter(adapter.linears.items()))
    inputs, updates = [], []

    def watch(_, args, y):
        real = batch.mask.flatten()
        inputs.append(args[0].flatten(0, -2)[real])
        updates.append((y - linear.base_layer(args[0])).flatten(0, -2)[real])

    hook = linear.register_forward_hook(watch)
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch.input_ids)
    hook.remove()
    x, d = torch.cat(inputs), torch.cat(updates)
    best = torch.linalg.lstsq(x, d).solution  # (D_in, D_out)
    moments = calibrate(model, adapter, [name], batches())[name]

    def error(rank):
        part = merge(moments, linear.lora_A, linear.lora_B, adapter.config.scale, rank)
        return float((d - x @ part.down.double().T @ part.up.double().T).norm() / d.norm())

    least = float((d - x @ best).norm() / d.norm())
    errors = [error(rank) for rank in (12, 6, 3, 1)]
    assert errors[0] == pytest.approx(least, rel=1e-2)
    assert errors == sorted(errors)
    assert 0.1 < least < errors[-1]


def test_merging_leaves_the_model_as_it_was():
    model, adapter = pool(active=2)
    before = model(input_ids=IDS).logits
    merged = merge_pool(model, adapter, batches(), rank=3)
    with applied(adapter, merged):
        assert not close(model(input_ids=IDS).logits, before, 9e-3)
    assert torch.equal(model(input_ids=IDS).logits, before)
