"""ResLoRA beside its formula written out with hooks, and what its paths cost once they are merged away."""

import json

import pytest
import torch
from helpers.common import close
from helpers.steps import rows
from helpers.tiny import backward_step, fill_adapter, recipe_text, tiny_model, write_recipe
from transformers import AutoModelForCausalLM

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import TargetError, apply_adapter
from remix_cli.core.precondition import precondition_gradients
from remix_cli.data.batches import collate
from remix_cli.errors import RecipeError
from remix_cli.export.nearest_lora import Merged, price
from remix_cli.recipe.schema import Router
from remix_cli.runs import load_run

KINDS = ["input", "block", "middle"]
LAYERS, RANK = 4, 2
SCALE = 2 / RANK**0.5
TARGETS = ("q_proj", "down_proj")


def adapted(kind, previous=1, **changes):
    config = AdapterConfig(
        **{"method": "reslora", "pool_size": 1, "active": 1, "rank": RANK, "target_modules": TARGETS} | changes,
        settings={"shortcut": kind, "previous": previous},
    )
    adapter = apply_adapter(tiny_model(num_hidden_layers=LAYERS), config, seed=0)
    fill_adapter(adapter)
    return adapter


def by_hooks(kind, previous, parameters):
    model = tiny_model(num_hidden_layers=LAYERS).requires_grad_(False)
    seen = {}

    def add(part, layer):
        def hook(_, args, output):
            a, b = ([parameters[f"model.layers.{i}.{part}.lora_{m}"] for i in range(LAYERS)] for m in "AB")
            seen[part, layer] = args[0]
            back = range(max(0, layer - previous), layer)
            if kind == "input":
                total = args[0]
                for j in back:
                    total = total + seen[part, j]
                added = total @ a[layer].T @ b[layer].T
            elif kind == "block":
                added = args[0] @ a[layer].T @ b[layer].T
                for j in back:
                    added = added + args[0] @ a[j].T @ b[j].T
            else:
                made = args[0] @ a[layer].T
                for j in back:
                    made = made + seen[part, j] @ a[j].T
                added = made @ b[layer].T
            return output + SCALE * added

        return hook

    for i, layer in enumerate(model.model.layers):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            layer.get_submodule(part).register_forward_hook(add(part, i))
    return model


def ids_of():
    return torch.randint(2, 60, (3, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("previous", [1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_the_formulas(kind, previous):
    adapter = adapted(kind, previous)
    copies = {name: p.detach().clone().requires_grad_() for name, p in adapter.parameters().items()}
    wanted = by_hooks(kind, previous, copies)(input_ids=ids_of(), use_cache=False).logits
    found = adapter.model(input_ids=ids_of(), use_cache=False).logits
    assert close(found, wanted, 1e-5)
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    (found * target).sum().backward()
    (wanted * target).sum().backward()
    assert all(close(p.grad, copies[name].grad, 1e-4) for name, p in adapter.parameters().items())
    assert all(linear.handed is None for linear in adapter.linears.values()), "else a pass keeps another's graph"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_and_a_disabled_adapter_change_nothing(kind):
    adapter, ids = adapted(kind), ids_of()
    with torch.no_grad():
        whole = adapter.model(input_ids=ids, use_cache=False).logits
        first = adapter.model(input_ids=ids[:, :4], use_cache=True)
        later = adapter.model(input_ids=ids[:, 4:], past_key_values=first.past_key_values).logits
        with adapter.disabled():
            base = adapter.model(input_ids=ids, use_cache=False).logits
        again = adapter.model(input_ids=ids, use_cache=False).logits
    assert close(torch.cat([first.logits, later], 1), whole, 1e-5)
    assert torch.equal(base, tiny_model(num_hidden_layers=LAYERS)(input_ids=ids, use_cache=False).logits)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_are_refused_where_a_layer_alone_would_compute_something_else(kind):
    adapter = adapted(kind)
    adapter.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(rows(), 0)
    if kind == "block":
        backward_step(adapter.model, adapter, batch, Router(), step=1)
        return
    with pytest.raises(RecipeError, match="leave gradient checkpointing out"):
        backward_step(adapter.model, adapter, batch, Router(), step=1)


@pytest.mark.parametrize(("kind", "previous"), [("across", 1), ("middle", 0), ("middle", "2")])
def test_settings_of_a_damaged_file_are_not_computed_with(kind, previous):
    with pytest.raises(ValueError, match="must be one of input, block, middle"):
        adapted(kind, previous)


def test_its_folder_is_no_plain_lora(stage, tmp_path, verb):
    """As one its paths would be dropped in silence."""
    model, data, _ = stage
    recipe = recipe_text(model, data, tmp_path / "run")
    recipe["adapter"] = {"method": "reslora", "rank": RANK}
    recipe["router"] = {}
    verb("train", write_recipe(tmp_path / "recipe.yaml", recipe))
    recipe["output_dir"] = str(tmp_path / "next")
    for adapter in (
        {"method": "rslora", "rank": RANK, "init_from": str(tmp_path / "run")},
        {"pool_size": 2, "active": 1, "rank": RANK, "init_from": [str(tmp_path / "run")] * 2},
    ):
        recipe["adapter"] = adapter
        _, err = verb("train", write_recipe(tmp_path / "recipe.yaml", recipe), expect=2)
        assert "method is reslora, and one LoRA is needed here" in err.replace("\n", " ")


def test_what_lies_in_no_layer_or_differs_in_size_is_refused():
    with pytest.raises(ValueError, match="stand alone"):
        precondition_gradients(adapted("middle"))
    model = tiny_model(num_hidden_layers=LAYERS)
    model.model.layers[2].mlp.down_proj = torch.nn.Linear(20, 16)
    config = AdapterConfig(
        **{"method": "reslora", "pool_size": 1, "active": 1, "rank": RANK, "target_modules": TARGETS},
        settings={"shortcut": "input", "previous": 1},
    )
    with pytest.raises(TargetError, match="another size than its namesakes"):
        apply_adapter(model, config, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_away_with_its_price(kind, stage, tmp_path, verb):
    """Exactly for `block`, at a price for the others, which a plain LoRA of the same A and B would not do better."""
    model, data, _ = stage
    recipe = recipe_text(model, data, tmp_path / "run")
    recipe["adapter"] = {"method": "reslora", "rank": RANK, "shortcut": kind}
    recipe["train"] |= {"learning_rate": 0.05, "max_steps": 6}
    verb("train", write_recipe(tmp_path / "recipe.yaml", recipe))
    out, _ = verb("export", tmp_path / "run", "--output", tmp_path / "out")
    run = load_run(tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = ids_of() % 50
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (run.model, loaded))
    card = (tmp_path / "out" / "README.md").read_text()
    if kind == "block":
        assert "exact" in out
        assert close(theirs, ours, 1e-4)
        return
    assert "also has paths from the layers before" in card
    said = dict(line.rsplit(None, 1) for line in out.splitlines() if line.startswith(("loss of", "KL(")))
    assert 0 < float(said["KL(trained, approximation) in nats a token"]) < 0.2
    assert float(said["loss of this approximation"]) < float(said["loss of the base model"])
    measured = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in measured if "eval_loss" in line]
    assert float(said["loss of the trained model"]) == pytest.approx(held_out[-1], rel=1e-3)
    without = {
        name: Merged(linear.lora_A.detach(), linear.lora_B.detach() * run.stored.config.scale)
        for name, linear in run.adapter.linears.items()
    }
    encoded = run.encoder.encode_rows(run.held_out_examples()).rows
    cost = price(run.model, run.adapter, without, [collate(encoded, 0)], "trained")
    divergence = "KL(trained, approximation) in nats a token"
    assert float(said[divergence]) < 0.5 * cost[divergence], "no better than leaving the paths out"
