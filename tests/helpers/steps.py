"""One training step on a tiny model, cut into micro-batches."""

import torch

from helpers.common import close
from helpers.tiny import fill_adapter, tiny_model
from remix_cli.core.config import AdapterConfig
from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.patch import apply_adapter
from remix_cli.data.batches import collate
from remix_cli.data.rows import EncodedRow
from remix_cli.train.micro_batch import accumulate_batch


def rows(count=4):
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(count):
        length = 6 + 2 * i
        ids = torch.randint(2, 60, (length,), generator=generator)
        made.append(EncodedRow(ids.numpy(), (torch.arange(length) >= length // 2).numpy(), "t"))
    return made


def build(checkpointing=False, dtype=torch.float32, **config):
    model = tiny_model(dtype=dtype).train()
    adapter = apply_adapter(model, AdapterConfig(**({"pool_size": 4, "active": 2, "rank": 2} | config)), seed=0)
    fill_adapter(adapter)
    if checkpointing:
        context = adapter.state.checkpoint_contexts
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})
    return model, adapter


def gradients(router, cuts=(4,), scale=1.0, beta=0.5, checkpointing=False, dtype=torch.float32, **config):
    """Gradient of one step whose four rows are cut into micro-batches of the given sizes."""
    model, adapter = build(checkpointing, dtype, **config)
    everything, start = rows(), 0
    targets = sum(int(r.supervised[1:].sum()) for r in everything)
    for size in cuts:
        accumulate_batch(
            model,
            adapter,
            collate(everything[start : start + size], start),
            router,
            make_estimator(router.estimator),
            targets_in_step=targets,
            seed=(0, 7),
            numbers={"beta": beta},
            backward=lambda loss: (loss * scale).backward(),
            loss_scale=scale,
            dropout_seed=3,
        )
        start += size
    return {name: p.grad / scale for name, p in adapter.parameters().items() if p.grad is not None}


def same(a, b, relative=1e-5):
    return all(close(a[name], b[name], relative) for name in b)
