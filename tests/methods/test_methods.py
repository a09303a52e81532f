"""Every finetuning method in one harness: trains, saves, loads, evaluates; and is what its paper says."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from helpers.common import close
from helpers.methods import FAST, small_method
from helpers.steps import rows
from helpers.tiny import backward_step, fill_adapter, recipe_text, tiny_model, write_recipe

from remix_cli.core.config import AdapterConfig, Pool
from remix_cli.core.description import misfit
from remix_cli.core.layer import RoutedLinear
from remix_cli.core.patch import apply_adapter
from remix_cli.core.step import balance_loss
from remix_cli.core.trace import Trace
from remix_cli.data.batches import collate
from remix_cli.errors import RecipeError
from remix_cli.methods.apply import apply_method
from remix_cli.methods.registry import METHODS, method_named, methods_by_name
from remix_cli.models import batch_losses
from remix_cli.recipe import load_recipe
from remix_cli.recipe.loader import dump
from remix_cli.recipe.schema import Router
from remix_cli.runs import load_run

TRAINED = [name for name, method in methods_by_name().items() if method.trains]


def ids_of(count=3, length=7):
    return torch.randint(2, 60, (count, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("adapter", "router", "key", "reason"),
    [
        ({"method": "lora"}, {"selections": 4}, "selections", "adapter.method lora"),
        ({"method": "lora"}, {"scope": "module"}, "scope", "adapter.method lora"),
        ({"method": "dora"}, {"learning_rate": 0.1}, "learning_rate", "adapter.method dora"),
        ({"method": "vblora"}, {"estimator": "rtg"}, "estimator", "adapter.method vblora"),
        ({"method": "mixlora"}, {"lora_gradient": "one"}, "lora_gradient", "adapter.method mixlora"),
        ({"method": "hydralora"}, {"balance": 0.1}, "balance", "adapter.method hydralora"),
        ({}, {"balance": 5.0}, "balance", "adapter.method remix"),
        ({}, {"fixed": True, "learning_rate": 0.1}, "learning_rate", "router.fixed"),
        ({}, {"fixed": True, "selections": 4}, "selections", "router.fixed"),
        ({}, {"estimator": "straight_through", "lora_gradient": "top", "selections": 4}, "selections", "draws none"),
    ],
)
def test_what_a_method_does_not_read_of_the_router_is_refused(adapter, router, key, reason, tmp_path):
    recipe = recipe_text("models/x", tmp_path / "rows.jsonl", tmp_path / "run") | {"adapter": adapter, "router": router}
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe))
    (line,) = error.value.problems
    assert f"router.{key}: is not read" in line
    assert reason in line
    recipe["router"] = {name: value for name, value in router.items() if name != key}
    written = dump(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)))
    assert key not in yaml.safe_load(written)["router"]


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_saves_loads_equal_and_evaluates(method, stage, tmp_path, verb):
    model, data, _ = stage
    evaluation = {"tasks": [{"task": "nll"}, {"task": "gsm8k", "max_new_tokens": 4, "limit": 4}]}
    recipe = recipe_text(model, data, tmp_path / "run", eval=evaluation)
    recipe["adapter"] = small_method(method)
    recipe["train"] |= {"max_steps": 2, "learning_rate": FAST.get(method, 0.02), "save_steps": 1}
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    out, _ = verb("train", path)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held = [line["eval_loss"] for line in logged if "eval_loss" in line]
    assert f"{method}: " in out
    assert held[0] != held[-1]  # the base model's, and after two steps
    verb("eval", tmp_path / "run")
    report = json.loads((tmp_path / "run" / "eval" / "adapter.json").read_text())
    assert report["results"][0]["scores"]["loss"] == pytest.approx(held[-1], rel=1e-5)
    run = load_run(tmp_path / "run")
    trained = {name: p.detach().clone() for name, p in run.adapter.parameters().items()}
    fresh = apply_method(tiny_model(seed=5), run.stored.config, seed=9)
    assert any(not torch.equal(p, trained[name]) for name, p in fresh.parameters().items())
    fresh.load(trained)
    assert all(torch.equal(p, trained[name]) for name, p in fresh.parameters().items())
    verb("eval", tmp_path / "run", "--base")
    base = json.loads((tmp_path / "run" / "eval" / "base.json").read_text())
    starts_at_base = not method_named(method).in_front  # untrained vectors in front are no zero
    assert (base["results"][0]["scores"]["loss"] == pytest.approx(held[0], rel=1e-5)) == starts_at_base
    # the second half of training from its checkpoint gives the same adapter
    (tmp_path / "run" / "summary.json").unlink()
    torch.random.manual_seed(99)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    verb("train", path, "--resume")
    again = load_run(tmp_path / "run").adapter.parameters()
    assert all(torch.equal(p, trained[name]) for name, p in again.items())


def test_without_training_the_base_model_is_scored_zero_and_few_shot(stage, tmp_path, verb):
    model, data, _ = stage
    shots = {"task": "gsm8k", "max_new_tokens": 4, "limit": 4, "shots": 2}
    shots["shots_from"] = {"path": str(data), "format": "gsm8k"}
    recipe = recipe_text(model, data, tmp_path / "run", eval={"tasks": [{"task": "nll"}, shots]})
    recipe["adapter"] = {"method": "none"}
    out, _ = verb("train", write_recipe(tmp_path / "recipe.yaml", recipe))
    assert "0 trained (nothing)" in out
    verb("eval", tmp_path / "run")
    verb("eval", tmp_path / "run", "--base")
    ours, base = (json.loads((tmp_path / "run" / "eval" / f"{n}.json").read_text()) for n in ("adapter", "base"))
    assert ours["results"][0]["scores"] == base["results"][0]["scores"]
    assert ours["results"][1]["protocol"]["shots"] == 2


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_our_lora_is_pefts_in_forward_and_gradients(method):
    from peft import LoraConfig, get_peft_model

    config = AdapterConfig(method=method, pool_size=1, active=1, rank=3, omega=method if method == "rslora" else "lora")
    ours = apply_method(tiny_model(), config, seed=0)
    fill_adapter(ours)
    theirs = get_peft_model(
        tiny_model(),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=3,
            lora_alpha=2,
            use_rslora=method == "rslora",
            target_modules=["gate_proj", "up_proj", "down_proj"],
        ),
    )
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in ours.parameters().items():
            stem, _, letter = name.rpartition(".")
            named[f"base_model.model.{stem}.{letter}.default.weight"].copy_(value)
    ids = ids_of()
    logits = [m(input_ids=ids, use_cache=False).logits for m in (ours.model, theirs)]
    assert close(logits[0], logits[1], 1e-6)
    for out in logits:
        out.logsumexp(-1).sum().backward()
    for name, value in ours.parameters().items():
        stem, _, letter = name.rpartition(".")
        assert close(value.grad, named[f"base_model.model.{stem}.{letter}.default.weight"].grad, 1e-5)
    assert not ours.routers


def weights_of(method, **config):
    adapter = apply_adapter(tiny_model(), AdapterConfig(method=method, rank=2, **config), seed=0)
    fill_adapter(adapter)
    with adapter.tracing(Trace()) as trace, torch.no_grad():
        adapter.model(input_ids=ids_of())
    return adapter, trace


def test_mixloras_weights_sum_to_one_over_the_chosen():
    adapter, trace = weights_of("mixlora", pool_size=6, active=2)
    for decision in trace.decisions.values():
        shares = decision.weights / adapter.config.total_weight
        assert close(shares.sum(-1), torch.ones(3, 7), 1e-6)
        assert torch.equal((shares > 0).sum(-1), torch.full((3, 7), 2))
        # the softmax over the chosen logits alone
        expected = decision.logits.gather(-1, decision.chosen).softmax(-1)
        assert close(shares.gather(-1, decision.chosen), expected, 1e-6)


def test_hydraloras_sum_is_written_out_with_its_gradients_and_count():
    """y = W x + s sum_i softmax(P x)_i B_i (A x): one A, each linear its own router; by hand and under autograd."""
    adapter, _ = weights_of("hydralora", pool_size=3, active=3, scope="module", router_unit_input=False)
    n, r, hidden, inner, layers = 3, 2, 16, 24, 2
    assert len(adapter.routers) == 3 * layers
    count = sum(p.numel() for p in adapter.parameters().values())
    linears = [(hidden, inner), (hidden, inner), (inner, hidden)]
    assert count == layers * sum(r * d_in + n * r * d_out + n * d_in for d_in, d_out in linears)
    for name, linear in adapter.linears.items():
        assert isinstance(linear, RoutedLinear)
        x = torch.randn(2, 5, linear.base_layer.in_features, requires_grad=True)
        y = linear(x)
        a, b, p = linear.lora_A, linear.lora_B, adapter.routers[name].weight
        q = (x @ p.T).softmax(-1)  # (2, 5, n)
        by_hand = linear.base_layer(x)
        for i in range(n):
            by_hand = by_hand + 2 / r**0.5 * q[..., i : i + 1] * ((x @ a.T) @ b[:, i * r : (i + 1) * r].T)
        assert close(y, by_hand, 1e-5)
        target = torch.randn_like(y)
        wanted = torch.autograd.grad((by_hand * target).sum(), (x, a, b, p), retain_graph=True)
        # under a trace, as in training, where the weights gather a gradient
        with adapter.tracing(Trace()):
            y = linear(x)
        found = torch.autograd.grad((y * target).sum(), (x, a, b, p))
        assert all(close(f, w, 1e-4) for f, w in zip(found, wanted, strict=True))


def test_the_balance_loss_is_one_when_even_and_n_when_one_lora_takes_all():
    _, trace = weights_of("mixlora", pool_size=4, active=1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    for decision in trace.decisions.values():
        decision.live = torch.zeros(3, 7, 4)
        decision.chosen = torch.arange(84).reshape(3, 7, 4)[..., :1].remainder(4)
    assert float(balance_loss(trace, mask)) == pytest.approx(1.0)
    for decision in trace.decisions.values():
        decision.live = torch.tensor([50.0, 0, 0, 0]).expand(3, 7, 4)
        decision.chosen = torch.zeros(3, 7, 1, dtype=torch.long)
    assert float(balance_loss(trace, mask)) == pytest.approx(4.0)
    mask[:, 3:] = False  # what stands at padding does not count
    for decision in trace.decisions.values():
        decision.live = decision.live.clone()
        decision.live[:, 3:] = torch.tensor([0.0, 50, 0, 0])
        decision.chosen = decision.chosen.clone()
        decision.chosen[:, 3:] = 1
    assert float(balance_loss(trace, mask)) == pytest.approx(4.0)


def soft_gradients(balance, checkpointing=False, method="mixlora"):
    model = tiny_model().train()
    active = 4 if method == "hydralora" else 2
    adapter = apply_adapter(model, AdapterConfig(method=method, pool_size=4, active=active, rank=2), seed=0)
    fill_adapter(adapter)
    if checkpointing:
        context = adapter.state.checkpoint_contexts
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})
    batch = collate(rows(), 0)
    backward_step(model, adapter, batch, Router(balance=balance), step=1)
    return {name: p.grad.clone() for name, p in adapter.parameters().items()}


@pytest.mark.parametrize("method", ["mixlora", "hydralora"])
def test_the_balance_loss_reaches_the_routers_and_survives_checkpointing(method):
    without, with_it = soft_gradients(0.0, method=method), soft_gradients(0.5, method=method)
    for name, gradient in with_it.items():
        if name.endswith("router"):  # with all LoRAs always chosen there is nothing to balance
            assert close(gradient, without[name], 1e-3) == (method == "hydralora")
    again = soft_gradients(0.5, checkpointing=True, method=method)
    assert all(close(again[name], gradient, 1e-5) for name, gradient in with_it.items())


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning"])
def test_virtual_tokens_do_not_shift_the_supervised_positions(method):
    """Row by row and padded together the losses agree, and they are those of the logits PEFT returns."""
    adapter = apply_method(tiny_model(), AdapterConfig(method=method, pool_size=1, active=1, virtual_tokens=3), seed=0)
    together = collate(rows(), 0)
    with torch.no_grad():
        losses = batch_losses(adapter.model, together)
        for i, row in enumerate(rows()):
            alone = batch_losses(adapter.model, collate([row], 0))
            length = len(row.input_ids)
            assert close(losses[i, : length - 1], alone[0, : length - 1], 1e-4)
            ids = torch.tensor(row.input_ids)[None]
            logits = adapter.model(input_ids=ids, use_cache=False).logits[0, -length:]
            expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
            supervised = torch.tensor(row.supervised)[1:]
            assert close(alone[0, : length - 1][supervised], expected[supervised], 1e-4)


@pytest.mark.parametrize("method", [m for m in TRAINED if method_named(m).pool is None])
def test_pefts_adapters_are_drawn_from_the_seed_and_leave_the_base_model_alone(method):
    config = AdapterConfig(method=method, pool_size=1, active=1, rank=2, vector_length=8, vectors=6, virtual_tokens=3)
    if method == "ia3":
        config = AdapterConfig(method=method, target_modules=("k_proj", "v_proj", "down_proj"))
    base = tiny_model()
    before = torch.random.get_rng_state()
    one, two, other = (apply_method(tiny_model(), config, seed=s) for s in (1, 1, 2))
    state = [{n: p.detach().clone() for n, p in a.parameters().items()} for a in (one, two, other)]
    assert all(torch.equal(state[0][n], state[1][n]) for n in state[0])
    assert method in ("ia3", "dora") or any(not torch.equal(state[0][n], state[2][n]) for n in state[0])
    torch.random.set_rng_state(before)
    ids = ids_of()
    with torch.no_grad():
        for p in one.parameters().values():
            p.add_(0.3)
        want = base(input_ids=ids, use_cache=False).logits
        assert not torch.equal(one.model(input_ids=ids, use_cache=False).logits[:, -7:], want)
        with one.disabled():
            assert torch.equal(one.model(input_ids=ids, use_cache=False).logits, want)


@pytest.mark.parametrize("method", ["dora", "vblora", "ia3", "p_tuning"])
def test_pefts_adapters_stay_float32_on_a_bfloat16_model(method):
    config = AdapterConfig(method=method, pool_size=1, active=1, rank=2, vector_length=8, vectors=6, virtual_tokens=3)
    adapter = apply_method(tiny_model(dtype=torch.bfloat16), config, seed=0)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    loss = batch_losses(adapter.model, collate(rows(), 0)).sum()
    loss.backward()
    assert all(p.grad is not None for p in adapter.parameters().values())


def test_dora_scales_its_update_as_lora_does_unless_asked_otherwise():
    """By 2/r or 2/sqrt(r); a folder older than the choice has the former."""
    scales = {}
    for settings in ({}, {"use_rslora": False}, {"use_rslora": True}):
        config = AdapterConfig(method="dora", pool_size=1, active=1, rank=4, settings=settings)
        adapter = apply_method(tiny_model(), config, seed=0)
        found = {m.scaling["default"] for m in adapter.model.modules() if hasattr(m, "lora_A")}
        scales[settings.get("use_rslora")] = found
    assert scales == {None: {0.5}, False: {0.5}, True: {1.0}}


SIZES = {
    "remix": {"pool_size": 5},
    "hydralora": {"rank": 3},
    "rslora": {"rank": 3},
    "dora": {"rank": 3},
    "vblora": {"vectors": 7},
    "prefix": {"virtual_tokens": 4},
    "prompt": {"virtual_tokens": 4},
    "p_tuning": {"virtual_tokens": 4},
}


@pytest.mark.parametrize("method", SIZES)
def test_a_methods_tensors_have_the_sizes_it_declares_and_no_others(method):
    config = AdapterConfig(method=method, pool_size=4, active=4, rank=2, vector_length=8, vectors=6, virtual_tokens=3)
    tensors = apply_method(tiny_model(), config, seed=0).tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sizes_of = method_named(method).tensor_sizes
    assert misfit(sizes_of(config), shapes) is None
    assert "declared" in misfit(sizes_of(replace(config, **SIZES[method])), shapes)
    assert "no tensor named" in misfit(sizes_of(config), {})


def test_a_pool_that_no_name_stands_for_describes_itself():
    """The folder of a method that the library does not know says how its pool works; others stay as they are."""
    config = AdapterConfig(method="mole", pool=Pool("softmax", shares_a=True))
    assert config.to_dict()["pool"] == {"rule": "softmax", "shares_a": True}
    assert AdapterConfig.from_dict(config.to_dict()) == config
    assert "pool" not in AdapterConfig(method="hydralora").to_dict()


REFUSED = [
    ({"adapter": {"method": "lora", "pool_size": 8}}, "adapter.pool_size: not a setting of lora"),
    ({"adapter": {"method": "prompt", "rank": 8}}, "which takes virtual_tokens; leave it out"),
    (
        {"adapter": {"method": "lora", "pool_size": 8, "active": 2}},
        "adapter.active: not a setting of lora (nor is pool_size)",
    ),
    ({"adapter": {"method": "hydralora", "active": 2}}, "adapter.active: not a setting of hydralora"),
    ({"adapter": {"method": "lorax"}}, "adapter.method: should be 'remix', 'mixlora'"),
    (
        {"adapter": {"method": "prefix"}, "train": {"gradient_checkpointing": True}},
        "train.gradient_checkpointing: cannot be combined with adapter.method: prefix",
    ),
    ({"adapter": {"method": "prompt"}, "train": {"cuda_graphs": True}}, "train.cuda_graphs: cannot be combined"),
    ({"adapter": {"method": "vblora", "vector_length": 7}}, "vblora: "),
    ({"adapter": {"method": "prompt", "virtual_tokens": 230}}, "and 230 virtual tokens, but the model reads at"),
]


@pytest.mark.parametrize("method", ["mixlora", "hydralora"])
def test_the_routing_of_soft_methods_is_shown(method, stage, tmp_path, verb):
    model, data, _ = stage
    recipe = recipe_text(model, data, tmp_path / "run")
    recipe["adapter"] = small_method(method)
    verb("train", write_recipe(tmp_path / "recipe.yaml", recipe))
    out, _ = verb("route-stats", tmp_path / "run")
    assert "down" in out or "mlp" in out


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_a_method_does_not_take_is_refused_in_one_line(changes, message, stage, tmp_path, verb):
    model, data, _ = stage
    recipe = recipe_text(model, data, tmp_path / "run")
    recipe["adapter"] = changes["adapter"]
    recipe["train"] |= changes.get("train", {})
    _, err = verb("validate", write_recipe(tmp_path / "recipe.yaml", recipe), expect=2)
    assert message in err.replace("\n", " ")


def test_each_method_has_its_own_defaults_and_a_dump_loads_again(stage, tmp_path):
    from remix_cli.recipe.loader import dump

    model, data, _ = stage
    rates = {}
    for method in METHODS:
        recipe = recipe_text(model, data, tmp_path / "run")
        recipe["adapter"] = {"method": method}
        del recipe["train"]["learning_rate"]
        loaded = load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe))
        rates[method] = loaded.train.learning_rate
        (tmp_path / "again.yaml").write_text(dump(loaded))
        assert load_recipe(tmp_path / "again.yaml") == loaded
    assert rates["remix"] == 1e-3
    assert rates["prompt"] == 3e-2
    soft = load_recipe(tmp_path / "recipe.yaml", ["adapter={method: mixlora}", "train.learning_rate=0.004"])
    assert (soft.router.learning_rate, soft.router.balance, soft.router.unit_input) == (0.004, 0.01, False)


def test_what_needs_a_router_says_so_of_a_method_without(stage, tmp_path, verb):
    model, data, _ = stage
    recipe = recipe_text(model, data, tmp_path / "run")
    recipe["adapter"] = {"method": "rslora", "rank": 2}
    verb("train", write_recipe(tmp_path / "recipe.yaml", recipe))
    _, err = verb("route-stats", tmp_path / "run", expect=2)
    assert "rslora, which has no router" in err
    _, err = verb("route-stats", tmp_path / "run", "--history", expect=5)
    assert "does the run's method have a router?" in err
    _, err = verb("eval", tmp_path / "run", "--selection", "sample", expect=2)
    assert "this is rslora" in err
