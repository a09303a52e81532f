"""The gradients of one micro-batch.

How this departs from ordinary supervised finetuning:
1. The batch runs forward M times, each time under another sampled selection of k of n LoRAs.
2. The LoRAs' gradient is the mean over those passes, or that of the first (`lora_gradient: one`), or that of one
   more pass under the top k (`top`); the passes that it does not come from keep no activations. A fixed router
   has that one pass alone.
3. Once all M losses are known, the router's gradient is estimated from them (core/estimators) and formed from
   the stored block inputs in closed form. No gradient flows between routers and LoRAs.
4. All random draws are functions of (seed, step, selection, row): see core/trace.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from remix_cli.core import routing
from remix_cli.core.estimators.base import Estimator, Numbers
from remix_cli.core.estimators.registry import ESTIMATORS
from remix_cli.core.estimators.rollouts import Rollouts, TopPass
from remix_cli.core.patch import Adapter
from remix_cli.core.step_routing import StepRouting
from remix_cli.core.trace import Decision, Seed, Trace
from remix_cli.data.batches import Batch
from remix_cli.errors import RecipeError
from remix_cli.models import batch_losses
from remix_cli.recipe.schema import Router as RouterRecipe


@dataclass
class MicroResult:
    """Sums over one micro-batch, still on the device; add them up, reduce them once a step."""

    loss: Tensor  # mean over selections of the summed token losses, divided by the step's target count
    routing: StepRouting
    advantage_variance: Tensor
    sums: Tensor  # (Estimator.sums,) what the estimator learns from


@dataclass(frozen=True)
class Passes:
    """The forward passes over one batch, in order: one under the top k, if any, then the samples.

    The first `with_gradient` of them are those that the LoRAs learn from.
    """

    top: int  # 0 or 1
    samples: int  # M; 0 where nothing is sampled
    with_gradient: int
    learns_from_top: bool  # the router learns from the pass under the top k alone

    @property
    def total(self) -> int:
        return self.top + self.samples

    @classmethod
    def of(cls, router: RouterRecipe, samples: bool) -> "Passes":
        """`samples`: does the method sample at all?"""
        if not samples or router.fixed:
            return cls(1, 0, 1, False)
        if router.lora_gradient == "top":
            alone = not ESTIMATORS[router.estimator].samples_beside_top
            return cls(1, 0 if alone else router.selections, 1, alone)
        return cls(0, router.selections, router.selections if router.lora_gradient == "mean" else 1, False)


def describe_router(router: RouterRecipe) -> str:
    """How the router of a method that samples is trained, in a line."""
    if router.fixed:
        return "fixed: the top k of its random start, in training too; one pass a batch"
    estimator = ESTIMATORS[router.estimator]
    passes = Passes.of(router, samples=True)
    sampled = f", M = {passes.samples}" if passes.samples else ""
    beside = "; the LoRAs learn from a pass under the top k" if passes.top else ""
    return f"{router.estimator}{sampled}: {estimator.summary}{beside}"


def accumulate_gradients(
    model: nn.Module,
    adapter: Adapter,
    batch: Batch,
    router: RouterRecipe,
    estimator: Estimator,
    *,
    targets_in_step: float | Tensor,
    seed: Seed,
    numbers: Numbers,
    backward: Callable[[Tensor], None],
    loss_scale: float = 1.0,
    dropout_seed: int | None = None,
) -> MicroResult:
    """Add this micro-batch's share of the step's gradient to every adapter parameter.

    `seed` is (run seed, step); `numbers` are the estimator's own; `backward` multiplies its argument by `loss_scale`
    before differentiating; `dropout_seed` decides what else is random in a forward pass. Nothing here waits for the
    device.
    """
    plan = Passes.of(router, adapter.config.samples)
    learns = router.learning_rate > 0 and (plan.samples > 0 or plan.learns_from_top)
    linear = learns and ESTIMATORS[router.estimator].linear
    traces: list[Trace] = []
    losses: list[Tensor] = []
    with adapter.unchanging():
        for index in range(plan.total):
            keep = index < plan.with_gradient
            draw = index - plan.top  # which of the M samples; -1 for the pass under the top k
            noise = adapter.noise((*seed, draw), batch.rows, batch.input_ids.shape[1]) if draw >= 0 else None
            trace = Trace(noise=noise, selection_grad=linear, prompt=batch.prompt)
            if dropout_seed is not None:
                torch.manual_seed(dropout_seed)  # one mask for all passes: it cancels in the baseline
            with adapter.tracing(trace), torch.set_grad_enabled(keep):
                loss = batch_losses(model, batch) / targets_in_step  # (B, T)
                whole = loss.sum() / plan.with_gradient
                if router.balance and not adapter.config.samples:
                    mine = len(batch.targets) if batch.real is None else batch.real.sum()
                    share = mine / targets_in_step  # of this micro-batch in the step
                    whole = whole + router.balance * share * balance_loss(trace, batch.mask)
            if keep:
                backward(whole)
            traces.append(trace)
            losses.append(loss.detach())
    # what the LoRAs were trained on: the samples, or the pass under the top k
    trained_on = losses[:1] if plan.top else losses
    mean_loss = torch.stack(trained_on).sum() / len(trained_on)
    if not adapter.routers:
        nothing = StepRouting.none(0, adapter.config.pool_size, mean_loss.device)
        return MicroResult(mean_loss, nothing, loss.new_zeros(()), loss.new_zeros(estimator.sums))
    first = plan.top if plan.samples else 0
    rollouts = _gather(adapter, batch, traces[first:], losses[first:])
    if first:
        rollouts.top = _top_pass(adapter, traces[0], losses[0])
    if linear:
        scale = adapter.config.scale * plan.with_gradient / loss_scale  # from d(mean loss)/d(weight) to dL/dz
        rollouts.selection_gradients = scale * _stack(adapter, traces[: plan.with_gradient], _weight_gradient)
    variance, sums = loss.new_zeros(()), loss.new_zeros(estimator.sums)
    if learns:
        estimate = estimator.estimate(rollouts, numbers)
        (slopes,) = torch.autograd.grad(estimate.surrogate, rollouts.logits)  # (M, L, B, T, n)
        scaled = slopes * loss_scale / _stack(adapter, traces[first:], lambda d: d.length)
        for i, r in enumerate(adapter.routers.values()):
            r.add_gradient([trace.decisions[r.name].inputs for trace in traces[first:]], scaled[:, i])
        variance, sums = estimate.advantage_variance, estimate.sums
    with torch.no_grad():
        weights = _stack(adapter, traces[first:], lambda d: d.weights.detach())
        measured = StepRouting.measure(rollouts.logits.detach(), rollouts.chosen, weights, rollouts.mask)
    return MicroResult(mean_loss, measured, variance, sums)


def balance_loss(trace: Trace, mask: Tensor) -> Tensor:
    """The load balance loss of MixLoRA (arXiv 2404.15159): n sum_i F_i P_i, the mean over routers.

    F_i is the share of the selections that went to LoRA i, P_i the mean of its probability, over the positions where
    `mask` (B, T) is True. It is 1 for each router when both are even.
    """
    total = torch.zeros((), device=mask.device)
    for decision in trace.decisions.values():
        if decision.live is None:
            continue
        n = decision.live.shape[-1]
        real = mask if decision.live.shape[1] > 1 else mask.any(-1, keepdim=True)
        chosen = routing.selection_mask(decision.chosen, n) & real.unsqueeze(-1)
        served = chosen.sum((0, 1)) / chosen.sum()
        likely = (decision.live.softmax(-1) * real.unsqueeze(-1)).sum((0, 1)) / real.sum()
        total = total + n * (served * likely).sum()
    return total / max(1, len(trace.decisions))


def _gather(adapter: Adapter, batch: Batch, traces: list[Trace], losses: list[Tensor]) -> Rollouts:
    """All routers' decisions in single tensors: they are a few numbers a token, and few kernels beat many."""
    rollouts = Rollouts(
        logits=_stack(adapter, traces, lambda d: d.logits).requires_grad_(),
        chosen=_stack(adapter, traces, lambda d: d.chosen),
        losses=torch.stack(losses),
        local=adapter.local,
        mask=batch.mask,
    )
    if adapter.config.level == "sequence":  # one decision a sequence, answering for all of its losses
        rollouts.losses = rollouts.losses.sum(-1, keepdim=True)
        rollouts.mask = batch.mask.any(-1, keepdim=True)
    return rollouts


def _top_pass(adapter: Adapter, trace: Trace, losses: Tensor) -> TopPass:
    by_sequence = adapter.config.level == "sequence"
    return TopPass(
        logits=_stack(adapter, [trace], lambda d: d.logits)[0],
        chosen=_stack(adapter, [trace], lambda d: d.chosen)[0],
        losses=losses.sum(-1, keepdim=True) if by_sequence else losses,
    )


def _stack(adapter: Adapter, traces: list[Trace], part: Callable[[Decision], Tensor]) -> Tensor:
    """(M, L, ...). Raises RecipeError for a router that the pass has not come to."""
    try:
        return torch.stack([torch.stack([part(t.decisions[name]) for name in adapter.routers]) for t in traces])
    except KeyError as error:
        raise RecipeError(f"adapter.target_modules: {error.args[0]} is not called in training; leave it out") from None


def _weight_gradient(decision: Decision) -> Tensor:
    gradient = decision.weights.grad
    assert gradient is not None  # the trace asked for it and the backward pass has run
    return gradient


def seed_of_dropout(seed: tuple[int, int], first_row: int) -> int:
    """A function of run seed, step and rows."""
    return int(np.random.SeedSequence([*seed, first_row]).generate_state(1)[0])
