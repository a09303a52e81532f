"""The gradients of one micro-batch.

How this departs from ordinary supervised finetuning:
1. The batch runs forward M times, each time under another sampled selection of k of n LoRAs.
2. The LoRAs' gradient is the mean over those passes, or that of the first (`lora_gradient: one`), or that of one
   more pass under the top k (`top`); the passes that it does not come from keep no activations. A fixed router
   has that one pass alone.
3. Once all M losses are known, the router's gradient is estimated from them (estimators/) and formed from
   the stored block inputs in closed form. No gradient flows between routers and LoRAs.
4. All random draws are functions of (seed, step, selection, row): see trace.py.

Letters: M selections, L routers, B sequences, T positions, n LoRAs in a pool, k active.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from remix_cli.core import routing
from remix_cli.core.estimators.base import Estimator, Numbers
from remix_cli.core.estimators.registry import ESTIMATORS
from remix_cli.core.estimators.rollouts import Rollouts, TopPass
from remix_cli.core.patch import Adapter
from remix_cli.core.step_routing import StepRouting
from remix_cli.core.trace import Decision, Seed, Trace
from remix_cli.errors import RecipeError

LoraGradient = Literal["mean", "one", "top"]


@dataclass(frozen=True)
class Passes:
    """The forward passes over one batch, in order: one under the top k, if any, then the samples.

    The first `with_gradient` of them are those that the LoRAs learn from.
    """

    top: int  # 0 or 1
    samples: int  # M; 0 where nothing is sampled
    with_gradient: int
    learns_from_top: bool  # the router learns from the pass under the top k alone
    router_learns: bool
    selection_gradients: bool  # the passes with gradient leave dL/dz to the estimator

    @property
    def total(self) -> int:
        return self.top + self.samples


def plan_passes(
    estimator: str = "rtg",
    *,
    selections: int = 2,
    lora_gradient: LoraGradient = "mean",
    fixed: bool = False,
    learns: bool = True,
    samples: bool = True,
    loras_learn: bool = True,
) -> Passes:
    """The passes that a batch takes, from how LoRAs and routers are to learn.

    `estimator` is a name of the registry, `selections` M. `fixed`: the routers keep their random start, and training
    takes the top k as inference does. `learns`: False leaves the routers as they are, but samples. `samples`: does
    the method sample at all (`AdapterConfig.samples`)? `loras_learn`: False where the LoRAs are frozen; then a pass
    has a gradient only for an estimator that reads it.
    """
    facts = ESTIMATORS[estimator]
    if not samples or fixed:
        return Passes(1, 0, 1, learns_from_top=False, router_learns=False, selection_gradients=False)
    from_top = lora_gradient == "top"
    from_top_alone = from_top and not facts.samples_beside_top
    drawn = 0 if from_top_alone else selections
    reads_gradient = learns and facts.linear
    with_gradient = drawn if lora_gradient == "mean" else 1
    return Passes(
        top=int(from_top),
        samples=drawn,
        with_gradient=with_gradient if loras_learn or reads_gradient else 0,
        learns_from_top=from_top_alone,
        router_learns=learns,
        selection_gradients=reads_gradient,
    )


@dataclass(frozen=True)
class BatchInputs:
    """What the step needs to know of a batch besides its losses."""

    rows: Tensor  # (B,) row ids, unique within the step: the draws are functions of them
    mask: Tensor  # (B, T) bool: True where a real token stands
    prompt: Tensor | None = None  # (B, T) bool: the positions that routing by sequence chooses from


@dataclass
class MicroResult:
    """Sums over one micro-batch, still on the device; add them up, reduce them once a step."""

    loss: Tensor  # mean over selections of the summed token losses, divided by the step's target count
    routing: StepRouting
    advantage_variance: Tensor
    sums: Tensor  # (Estimator.sums,) what the estimator learns from


def accumulate_gradients(
    adapter: Adapter,
    token_losses: Callable[[], Tensor],
    inputs: BatchInputs,
    passes: Passes,
    estimator: Estimator,
    *,
    seed: Seed,
    numbers: Numbers | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    loss_scale: float = 1.0,
    balance: float | Tensor = 0.0,
    dropout_seed: int | None = None,
) -> MicroResult:
    """Add this micro-batch's share of the step's gradient to every adapter parameter.

    `token_losses()` runs the model and returns the losses (B, T) at the positions of the logits, divided by the
    number of targets of the whole step; it is called once for every pass. `seed` is (run seed, step); `numbers` are
    the estimator's own, by default as it has them; `backward` multiplies its argument by `loss_scale` before
    differentiating. `balance` weighs `balance_loss`, for methods whose router learns with the LoRAs. `dropout_seed`
    decides what else is random in a forward pass. Nothing here waits for the device.
    """
    with adapter.unchanging():
        traces, losses = _run_passes(
            adapter, token_losses, inputs, passes, seed, backward=backward, balance=balance, dropout_seed=dropout_seed
        )
    # what the LoRAs were trained on: the samples, or the pass under the top k
    trained_on = losses[:1] if passes.top else losses
    mean_loss = torch.stack(trained_on).sum() / len(trained_on)
    nothing = mean_loss.new_zeros(())
    learnt_from = mean_loss.new_zeros(estimator.sums)
    if not adapter.routers:
        unrouted = StepRouting.none(0, adapter.config.pool_size, mean_loss.device)
        return MicroResult(mean_loss, unrouted, nothing, learnt_from)
    rollouts = _gather(adapter, inputs, passes, traces, losses, loss_scale)
    judged = _judged(passes, traces)
    with torch.no_grad():
        weights = _stack(adapter, judged, lambda decision: decision.weights.detach())
        measured = StepRouting.measure(rollouts.logits.detach(), rollouts.chosen, weights, rollouts.mask)
    if not passes.router_learns:
        return MicroResult(mean_loss, measured, nothing, learnt_from)
    estimate = estimator.estimate(rollouts, estimator.numbers() if numbers is None else numbers)
    (slopes,) = torch.autograd.grad(estimate.surrogate, rollouts.logits)  # (M, L, B, T, n)
    _add_router_gradients(adapter, judged, slopes * loss_scale)
    return MicroResult(mean_loss, measured, estimate.advantage_variance, estimate.sums)


def _run_passes(
    adapter: Adapter,
    token_losses: Callable[[], Tensor],
    inputs: BatchInputs,
    passes: Passes,
    seed: Seed,
    *,
    backward: Callable[[Tensor], None],
    balance: float | Tensor,
    dropout_seed: int | None,
) -> tuple[list[Trace], list[Tensor]]:
    """Every pass forward, those that the LoRAs learn from backward, too; what each chose, and its losses (B, T)."""
    traces: list[Trace] = []
    losses: list[Tensor] = []
    for index in range(passes.total):
        keep = index < passes.with_gradient
        trace = _new_trace(adapter, inputs, passes, index, seed)
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)  # one mask for all passes: it cancels in the baseline
        with adapter.tracing(trace), torch.set_grad_enabled(keep):
            loss = token_losses()
            if keep:
                whole = loss.sum() / passes.with_gradient
                if isinstance(balance, Tensor) or balance:
                    whole = whole + balance * balance_loss(trace, inputs.mask)
        if keep:
            backward(whole)
        traces.append(trace)
        losses.append(loss.detach())
    return traces, losses


def _new_trace(adapter: Adapter, inputs: BatchInputs, passes: Passes, index: int, seed: Seed) -> Trace:
    """That of pass `index`: of a sample, with the noise it draws by; or of the pass under the top k, without."""
    sample = index - passes.top
    noise = None
    if sample >= 0:
        noise = adapter.noise((*seed, sample), inputs.rows, inputs.mask.shape[1])
    return Trace(noise=noise, selection_grad=passes.selection_gradients, prompt=inputs.prompt)


def _judged(passes: Passes, traces: list[Trace]) -> list[Trace]:
    """The passes that the router is judged by: the samples, or where there are none the pass under the top k."""
    return traces[passes.top :] if passes.samples else traces


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


def _gather(
    adapter: Adapter,
    inputs: BatchInputs,
    passes: Passes,
    traces: list[Trace],
    losses: list[Tensor],
    loss_scale: float,
) -> Rollouts:
    """All routers' decisions in single tensors: they are a few numbers a token, and few kernels beat many."""
    judged = _judged(passes, traces)
    rollouts = Rollouts(
        logits=_stack(adapter, judged, lambda decision: decision.logits).requires_grad_(),
        chosen=_stack(adapter, judged, lambda decision: decision.chosen),
        losses=torch.stack(losses[-len(judged) :]),
        local=adapter.local,
        mask=inputs.mask,
    )
    if adapter.config.level == "sequence":  # one decision a sequence, answering for all of its losses
        rollouts.losses = rollouts.losses.sum(-1, keepdim=True)
        rollouts.mask = inputs.mask.any(-1, keepdim=True)
    if passes.top and passes.samples:
        rollouts.top = _top_pass(adapter, traces[0], losses[0])
    if passes.selection_gradients:
        to_selection = adapter.config.scale * passes.with_gradient / loss_scale  # from d(mean loss)/d(weight) to dL/dz
        rollouts.selection_gradients = to_selection * _stack(adapter, traces[: passes.with_gradient], _weight_gradient)
    return rollouts


def _top_pass(adapter: Adapter, trace: Trace, losses: Tensor) -> TopPass:
    by_sequence = adapter.config.level == "sequence"
    return TopPass(
        logits=_stack(adapter, [trace], lambda decision: decision.logits)[0],
        chosen=_stack(adapter, [trace], lambda decision: decision.chosen)[0],
        losses=losses.sum(-1, keepdim=True) if by_sequence else losses,
    )


def _add_router_gradients(adapter: Adapter, judged: list[Trace], slopes: Tensor) -> None:
    """`slopes` (M, L, B, T, n) are the surrogate's gradient with respect to the logits P x / length."""
    by_product = slopes / _stack(adapter, judged, lambda decision: decision.length)
    for i, router in enumerate(adapter.routers.values()):
        inputs = [trace.decisions[router.name].inputs for trace in judged]
        router.add_gradient(inputs, by_product[:, i])


def _stack(adapter: Adapter, traces: list[Trace], part: Callable[[Decision], Tensor]) -> Tensor:
    """One part of every decision, (M, L, ...). Raises RecipeError for a router that the pass has not come to."""
    by_pass = []
    for trace in traces:
        missed = next((name for name in adapter.routers if name not in trace.decisions), None)
        if missed is not None:
            raise RecipeError(f"adapter.target_modules: {missed} is not called in training; leave it out")
        by_pass.append(torch.stack([part(trace.decisions[name]) for name in adapter.routers]))
    return torch.stack(by_pass)


def _weight_gradient(decision: Decision) -> Tensor:
    gradient = decision.weights.grad
    assert gradient is not None  # the trace asked for it and the backward pass has run
    return gradient
