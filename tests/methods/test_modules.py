"""Pools of a layer's modules: MiLoRA, and ReMix over modules, beside the formula written out with hooks."""

import json

import pytest
import torch
from helpers.common import close
from helpers.steps import rows
from helpers.tiny import backward_step, fill_adapter, recipe_text, tiny_model, write_recipe
from transformers import Phi3Config, Phi3ForCausalLM

from remix_cli.core.config import POOLS, AdapterConfig
from remix_cli.core.patch import TargetError, apply_adapter
from remix_cli.core.precondition import precondition_gradients
from remix_cli.core.trace import Trace
from remix_cli.data.batches import collate
from remix_cli.methods.milora import OF_A_LAYER
from remix_cli.recipe.schema import Router

METHODS = ["milora", "remix_modules"]
RANK, ACTIVE = 2, 3


def pool_of(method, **changes) -> AdapterConfig:
    usual = {"method": method, "target_modules": tuple(OF_A_LAYER), "active": ACTIVE, "rank": RANK}
    return AdapterConfig(**usual | {"level": "sequence", "router_unit_input": False} | changes)


def adapted(method, **changes):
    adapter = apply_adapter(tiny_model(), pool_of(method, **changes), seed=0)
    fill_adapter(adapter)
    return adapter


def by_hooks(method, parameters):
    """The tiny model with the method put on by hooks: W x + w_i B_i A_i x, with layer by layer the prompt's own w."""
    model = tiny_model().requires_grad_(False)
    prompt = torch.zeros(())
    weights = {}

    def choose(index):
        def hook(_, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            mean = (x * prompt.unsqueeze(-1)).sum(1) / prompt.sum(1, keepdim=True)
            router = parameters[f"model.layers.{index}.router"]
            logits = (mean if method == "milora" else mean.detach()) @ router.T  # (B, 7)
            chosen = logits.topk(ACTIVE, -1).indices
            on = torch.zeros_like(logits).scatter(-1, chosen, 1.0)
            omega = 2 / RANK**0.5
            shares = logits.masked_fill(on == 0, -torch.inf).softmax(-1)
            weights[index] = shares * ACTIVE * omega if method == "milora" else (on * omega).requires_grad_()

        return hook

    def add(name, index, place):
        def hook(_, args, output):
            a, b = parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"]
            return output + weights[index][:, place, None, None] * (args[0] @ a.T @ b.T)

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(choose(index), with_kwargs=True)
        for place, part in enumerate(OF_A_LAYER):
            parent = "self_attn" if part[0] in "qkvo" else "mlp"
            name = f"{parent}.{part}"
            layer.get_submodule(name).register_forward_hook(add(f"model.layers.{index}.{name}", index, place))

    def run(ids, mask):
        nonlocal prompt
        prompt = mask.float()
        return model(input_ids=ids, use_cache=False).logits

    return run, weights


def ids_and_prompt():
    ids = torch.randint(2, 60, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for row, length in enumerate((3, 5, 4)):
        mask[row, :length] = True
    return ids, mask


@pytest.mark.parametrize("method", METHODS)
def test_forward_and_gradients_are_the_formulas(method):
    adapter = adapted(method)
    ids, mask = ids_and_prompt()
    copies = {name: p.detach().clone().requires_grad_() for name, p in adapter.parameters().items()}
    run, weights = by_hooks(method, copies)
    wanted = run(ids, mask)
    with adapter.tracing(Trace(prompt=mask, selection_grad=True)) as trace:
        found = adapter.model(input_ids=ids, use_cache=False).logits
    assert close(found, wanted, 1e-5)
    sets = {tuple(row) for decision in trace.decisions.values() for row in decision.chosen[:, 0].sort().values.tolist()}
    assert len(sets) > 2, "else a wrong place would not show"
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    (found * target).sum().backward()
    (wanted * target).sum().backward()
    for name, parameter in adapter.parameters().items():
        if method == "remix_modules" and name.endswith("router"):
            continue  # learns from the losses of sets, not from this gradient
        assert close(parameter.grad, copies[name].grad, 1e-4), name
    if method == "remix_modules":
        for index, decision in enumerate(trace.decisions.values()):
            assert close(decision.weights.grad[:, 0], weights[index].grad, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_decides_once(method):
    """What follows the prompt changes no choice, and neither a cache nor a recomputation changes an output."""
    adapter = adapted(method)
    ids, mask = ids_and_prompt()
    mask[:, 3:] = False
    chosen = []
    for other in (ids, torch.cat([ids[:, :3], 61 - ids[:, 3:]], -1)):
        with adapter.tracing(Trace(prompt=mask)) as trace, torch.no_grad():
            whole = adapter.model(input_ids=other, use_cache=False).logits
        chosen.append([decision.chosen for decision in trace.decisions.values()])
        with adapter.tracing(Trace(prompt=mask[:, :3], record=False)), torch.no_grad():
            first = adapter.model(input_ids=other[:, :3], use_cache=True)
            later = adapter.model(input_ids=other[:, 3:], past_key_values=first.past_key_values).logits
        assert close(torch.cat([first.logits, later], 1), whole, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations_give_the_same_gradients(method):
    gradients = []
    for checkpointing in (False, True):
        adapter = adapted(method)
        model = adapter.model.train()
        if checkpointing:
            context = adapter.state.checkpoint_contexts
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})
        batch = collate(rows(), 0)
        router = Router(level="sequence", balance=0.5) if method == "milora" else Router(level="sequence", selections=2)
        backward_step(model, adapter, batch, router, step=1)
        gradients.append({name: p.grad.clone() for name, p in adapter.parameters().items()})
    plain, recomputed = gradients
    assert all(float(gradient.abs().sum()) > 0 for name, gradient in plain.items() if name.endswith("router"))
    assert all(close(recomputed[name], gradient, 1e-5) for name, gradient in plain.items())


def test_a_linear_holds_one_lora_and_its_weight_does_not_depend_on_how_many_are_on():
    for active in (1, 7):
        adapter = adapted("remix_modules", active=active)
        assert adapter.config.pool_size == len(OF_A_LAYER)
        assert adapter.config.scale == 2 / RANK**0.5
        shapes = {
            name.rpartition(".")[2]: tuple(p.shape) for name, p in adapter.parameters().items() if "layers.0" in name
        }
        assert shapes == {"lora_A": (RANK, 24), "lora_B": (16, RANK), "router": (7, 16)}
        assert list(adapter.routers) == ["model.layers.0", "model.layers.1"]


def test_preconditioned_gradients_are_those_of_each_lora():
    adapter = adapted("remix_modules")
    backward_step(adapter.model, adapter, collate(rows(), 0), Router(level="sequence", selections=2), step=1)
    before = {name: p.grad.clone() for name, p in adapter.lora_parameters().items()}
    precondition_gradients(adapter, damping=0.0)
    for name, linear in adapter.linears.items():
        gram = linear.lora_B.T @ linear.lora_B * adapter.config.scale**2
        assert close(linear.lora_A.grad, torch.linalg.solve(gram, before[f"{name}.lora_A"]), 5e-3), name


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "all-linear"), "must name the linears of a layer"),
        (("q_proj", "v_proj", r".*\.mlp\..*"), "has 5 linears for the 3 names q_proj, v_proj"),
        (("q_proj", "v_proj", r".*layers\.1\.mlp\.up_proj"), "has 2 linears for the 3 names"),
    ],
)
def test_a_layer_must_have_one_linear_for_each_name(targets, message):
    with pytest.raises((ValueError, TargetError), match=message):
        apply_adapter(tiny_model(), pool_of("milora", target_modules=targets, active=1), seed=0)


def test_names_that_stand_for_others_are_refused():
    """They would change the pool's size after the recipe has said it."""
    config = Phi3Config(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0},
        **{"num_attention_heads": 2, "num_key_value_heads": 1},
    )
    targets = ("gate_proj", "up_proj", "down_proj")
    with pytest.raises(TargetError, match=r"name this model's linears, .*: gate_up_proj, down_proj"):
        apply_adapter(Phi3ForCausalLM(config), pool_of("milora", target_modules=targets, active=1), seed=0)


def test_a_pool_of_modules_describes_itself():
    config = pool_of("mole", pool=POOLS["milora"])
    written = config.to_dict()
    assert written["pool"] == {"rule": "softmax", "shares_a": False, "of_modules": True}
    assert AdapterConfig.from_dict(written) == config
    with pytest.raises(ValueError, match="must be block"):
        pool_of("milora", scope="model")


def test_the_command_line_shows_it_and_says_what_it_cannot_be_made_into(stage, tmp_path, verb):
    model, data, _ = stage
    recipe = recipe_text(model, data, tmp_path / "run", router={"learning_rate": 0.1})
    recipe["adapter"] = {"method": "remix_modules", "rank": RANK}
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert json.loads(verb("validate", path, "--json")[0])["parameters"]["router"] == 2 * 7 * 16
    verb("train", path)
    report = json.loads(verb("route-stats", tmp_path / "run", "--json")[0])
    assert (report["pool_size"], report["active"]) == (7, 3)
    assert [block["similarity"] for block in report["blocks"]] == [0, 0]
    verb("route-stats", tmp_path / "run", "--headroom")
    _, err = verb("export", tmp_path / "run", "--output", tmp_path / "out", expect=2)
    assert "chooses among a layer's modules" in err.replace("\n", " ")
    recipe["adapter"]["pool_size"] = 8
    message = verb("validate", write_recipe(path, recipe), expect=2)[1]
    assert "adapter.pool_size: not a setting of remix_modules" in message
    del recipe["adapter"]["pool_size"]
    recipe["router"]["scope"] = "model"
    assert "router.scope" in verb("validate", write_recipe(path, recipe), expect=2)[1]
