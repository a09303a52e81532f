"""One training step's gradients: invariances that must hold whatever the estimator."""

import pytest
import torch
from helpers.common import close
from helpers.steps import build, gradients, rows, same
from helpers.tiny import backward_step, tiny_model

from remix_cli.core import layer, routing
from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import Adapter, apply_adapter, compile_unadapted
from remix_cli.core.product import gates_of
from remix_cli.core.trace import Trace, Weighting
from remix_cli.data.batches import collate
from remix_cli.models import batch_losses
from remix_cli.recipe.schema import Router
from remix_cli.train import micro_batch

ESTIMATORS = ["paper", "rtg", "control_variate", "straight_through"]


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("estimator", ["rtg", "control_variate", "straight_through"])
@pytest.mark.parametrize("gradient", ["mean", "one", "top"])
def test_accumulation_changes_nothing(estimator, gradient):
    router = Router(estimator=estimator, selections=3, lora_gradient=gradient)
    assert same(gradients(router, cuts=(2, 2)), gradients(router))
    assert same(gradients(router, cuts=(1, 3)), gradients(router))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_checkpointing_changes_nothing(estimator):
    router = Router(estimator=estimator)
    assert same(gradients(router, checkpointing=True), gradients(router))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_checkpointing_changes_nothing_with_one_router_of_the_model(estimator, level):
    router = Router(estimator=estimator)
    one = {"level": level, "scope": "model"}
    assert same(gradients(router, checkpointing=True, **one), gradients(router, **one))
    assert not same(gradients(router, level=level), gradients(router, **one))


def test_a_repeated_block_follows_its_own_pass():
    """Two passes forward, then the first one backward: its later block must not repeat what the second has chosen."""
    found = []
    for checkpointing in (False, True):
        model, adapter = build(checkpointing, torch.float32, scope="model")
        batch = collate(rows())
        losses = []
        for sample in range(2):
            trace = Trace(noise=adapter.noise((0, sample), batch.rows, batch.mask.shape[1]), prompt=batch.prompt)
            with adapter.tracing(trace):
                losses.append(batch_losses(model, batch).sum())
        losses[0].backward()
        found.append({name: p.grad for name, p in adapter.lora_parameters().items()})
    assert same(*found)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_routing_by_sequence_survives_accumulation_and_checkpointing(estimator):
    router = Router(estimator=estimator)
    whole = gradients(router, level="sequence")
    assert same(gradients(router, checkpointing=True, level="sequence"), whole)
    if estimator != "paper":  # whose reward is the micro-batch
        assert same(gradients(router, cuts=(3, 1), level="sequence"), whole)
    assert not same(gradients(router), whole)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loss_scaling_cancels(estimator):
    router = Router(estimator=estimator)
    assert same(gradients(router, scale=1024.0), gradients(router))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_bfloat16_model_gives_nearly_the_same_gradients(estimator, monkeypatch):
    """Same selections, so that a rounded logit cannot flip one; adapters and their gradients stay float32."""
    selections, top_k = [], routing.top_k
    monkeypatch.setattr(routing, "top_k", lambda scores, k: selections.append(top_k(scores, k)) or selections[-1])
    router = Router(estimator=estimator)
    exact = gradients(router)
    again = iter(selections)
    monkeypatch.setattr(routing, "top_k", lambda scores, k: next(again))
    rounded = gradients(router, dtype=torch.bfloat16)
    assert selections
    assert next(again, None) is None
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        # A reward is a difference of losses, so a score's gradient loses more digits than a LoRA's.
        assert cosine(gradient, exact[name]) > (0.999 if "lora" in name else 0.99), name


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_router_learns(estimator):
    found = gradients(Router(estimator=estimator))
    assert all(found[name].norm() > 0 for name in found if name.endswith("router"))


def test_straight_through_is_the_gradient_through_inclusion_probabilities(monkeypatch):
    """Against autograd through a forward pass whose weights are omega (z + pi - stop(pi))."""
    ours = gradients(Router(estimator="straight_through", selections=1))
    model, adapter = build()
    batch = collate(rows())
    noise = adapter.noise((0, 7, 0), batch.rows, batch.input_ids.shape[1])

    def forward(self, x):
        logits, _ = self.scores(x.detach())
        pi = routing.inclusion_probabilities(logits, 2)
        chosen = routing.top_k(logits.detach() + noise[self.index], 2)
        weights = self.config.scale * (routing.selection_mask(chosen, 4) + pi - pi.detach())
        return Weighting(gates_of(weights, self.config.rank, x.dtype), weights)

    monkeypatch.setattr(layer.Router, "forward", forward)
    (micro_batch.batch_losses(model, batch).sum() / len(batch.targets)).backward()
    assert all(close(ours[name], p.grad, 1e-5) for name, p in adapter.parameters().items())


def test_a_fixed_router_trains_the_loras_under_the_top_k_in_one_pass_and_never_moves():
    model, adapter = build()
    batch = collate(rows(), 0)
    found = gradients(Router(fixed=True))
    assert all("lora" in name for name in found)
    with adapter.tracing(Trace(prompt=batch.prompt)):  # no noise: the top k
        (batch_losses(model, batch).sum() / len(batch.targets)).backward()
    assert same(found, {name: p.grad for name, p in adapter.lora_parameters().items()})


@pytest.mark.parametrize("estimator", ["paper", "rtg", "control_variate", "straight_through"])
def test_with_a_pass_under_the_top_k_the_loras_learn_from_it_alone(estimator):
    """Whatever is sampled beside it moves the router only."""
    found = gradients(Router(estimator=estimator, selections=1, lora_gradient="top"))
    fixed = gradients(Router(fixed=True))
    assert same({name: found[name] for name in fixed}, fixed)
    routers = [name for name in found if name.endswith("router")]
    assert routers
    assert all(found[name].abs().max() > 0 for name in routers)


def test_straight_through_from_the_top_k_is_h_times_the_slope_of_the_inclusion_probabilities():
    model, adapter = build()
    batch = collate(rows(), 0)
    trace = Trace(selection_grad=True, prompt=batch.prompt)
    with adapter.tracing(trace):
        (batch_losses(model, batch).sum() / len(batch.targets)).backward()
    found = gradients(Router(estimator="straight_through", lora_gradient="top"))
    for name, router in adapter.routers.items():
        decision = trace.decisions[name]
        logits = (decision.inputs @ router.weight.T) / decision.length
        h = decision.weights.grad * adapter.config.scale * batch.mask.unsqueeze(-1)
        pi = routing.inclusion_probabilities(logits, adapter.config.active)
        (expected,) = torch.autograd.grad((h * pi).sum(), router.weight)
        assert close(found[f"{name}.router"], expected, 1e-4)


def test_one_selection_gives_the_lora_gradient_of_that_selection():
    one = gradients(Router(selections=3, lora_gradient="one"))
    alone = gradients(Router(selections=1, estimator="straight_through", learning_rate=0.0))
    assert all(close(one[name], alone[name], 1e-5) for name in one if "lora" in name)


def test_mean_is_the_mean_of_the_selections():
    """M = 2 with `mean` equals the average of two passes under the two selections."""
    mean = gradients(Router(selections=2))
    model, adapter = build()
    batch = collate(rows())
    targets = len(batch.targets)
    for m in range(2):
        noise = adapter.noise((0, 7, m), batch.rows, batch.input_ids.shape[1])
        with adapter.tracing(Trace(noise=noise)):
            (micro_batch.batch_losses(model, batch).sum() / targets / 2).backward()
    assert all(close(p.grad, mean[name], 1e-5) for name, p in adapter.lora_parameters().items())


def test_dropout_is_shared_by_the_selections(monkeypatch):
    """Without noise every selection is the top k, so with one dropout mask all M losses must agree."""
    seen = []
    quiet = lambda self, seed, rows, length: torch.zeros(2, len(rows), length, 4)  # noqa: E731
    monkeypatch.setattr(Adapter, "noise", quiet)
    original = micro_batch.batch_losses
    monkeypatch.setattr(micro_batch, "batch_losses", lambda *a: seen.append(original(*a)) or seen[-1])
    gradients(Router(selections=3), dropout=0.5)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    gradients(Router(selections=3), dropout=0.0)
    assert not torch.equal(seen[0], seen[3])


def test_N4_equal_losses_leave_the_router_where_it_is():
    """B = 0: selections make no difference, so advantages and the router's gradient are exactly zero."""
    model = tiny_model().train()
    adapter = apply_adapter(model, AdapterConfig(pool_size=4, active=2, rank=2), seed=0)
    batch = collate(rows())
    backward_step(model, adapter, batch, Router())
    assert all(p.grad.abs().max() == 0 for p in adapter.router_parameters().values())


def test_nothing_is_sampled_twice_when_every_lora_is_on(monkeypatch):
    """k = n: plain LoRA, one pass whatever M says."""
    seen = []
    original = micro_batch.batch_losses
    monkeypatch.setattr(micro_batch, "batch_losses", lambda *a: seen.append(0) or original(*a))
    gradients(Router(selections=3), active=4)
    assert len(seen) == 1


@pytest.mark.slow
def test_compiling_what_is_not_adapted_changes_nothing():
    """Attention and norms only; aot_eager needs no C++ compiler."""
    torch._dynamo.reset()
    router = Router(estimator="straight_through", selections=1)
    expected = gradients(router)
    model, adapter = build()
    assert compile_unadapted(model, backend="aot_eager") == 2 * 3  # two norms and attention of each layer
    batch = collate(rows())
    backward_step(model, adapter, batch, router, step=7, beta=0.5)
    assert same({name: p.grad for name, p in adapter.parameters().items()}, expected)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    assert not torch._dynamo.utils.counters["graph_break"]
