"""The gradients of one micro-batch.

How this departs from ordinary supervised finetuning:
1. The batch runs forward M times, each time under another sampled selection of k of n LoRAs.
2. The LoRAs' gradient is the mean over those passes (or that of the first, `lora_gradient: one`); the other
   passes then keep no activations.
3. Once all M losses are known, the router's gradient is estimated from them (objective.py) and formed from
   the stored block inputs in closed form. No gradient flows between routers and LoRAs.
4. All random draws are functions of (seed, step, selection, row): see adapter/trace.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from remix_cli.adapter import routing
from remix_cli.adapter.patch import Adapter
from remix_cli.adapter.trace import Trace
from remix_cli.data.batches import Batch
from remix_cli.models import batch_losses
from remix_cli.objective import Rollouts, router_surrogate
from remix_cli.recipe.schema import Router as RouterRecipe


@dataclass
class MicroResult:
    """Sums over one micro-batch, still on the device; add them up, reduce them once a step."""

    loss: Tensor  # mean over selections of the summed token losses, divided by the step's target count
    entropy: Tensor  # sum over routers and tokens of the entropy of q, nats
    ess: Tensor  # sum over routers and tokens of the effective support size of q
    decisions: Tensor  # how many (router, token) pairs those sums hold
    advantage_variance: Tensor
    fit: Tensor  # (2,) the control variate's regression sums


def accumulate_gradients(
    model: nn.Module,
    adapter: Adapter,
    batch: Batch,
    router: RouterRecipe,
    *,
    targets_in_step: int,
    seed: tuple[int, int],
    beta: float,
    backward: Callable[[Tensor], None],
    loss_scale: float = 1.0,
) -> MicroResult:
    """Add this micro-batch's share of the step's gradient to every adapter parameter.

    `seed` is (run seed, step); `backward` multiplies its argument by `loss_scale` before differentiating.
    """
    sampled = adapter.config.samples
    by_policy = sampled and router.estimator != "straight_through" and router.learning_rate > 0
    selections = router.selections if sampled else 1
    with_gradient = selections if router.lora_gradient == "mean" else 1
    traces: list[Trace] = []
    losses: list[Tensor] = []
    for m in range(selections):
        keep = m < with_gradient
        trace = Trace(
            noise=adapter.noise((*seed, m), batch.rows, batch.input_ids.shape[1]),
            selection_grad=router.estimator == "control_variate",
            straight_through=router.estimator == "straight_through",
        )
        torch.manual_seed(dropout_seed(seed, batch.first_row))  # one dropout mask for all M: it cancels in the baseline
        with adapter.tracing(trace), torch.set_grad_enabled(keep):
            loss = batch_losses(model, batch) / targets_in_step  # (B, T)
        if keep:
            backward(loss.sum() / with_gradient)
        traces.append(trace)
        losses.append(loss.detach())
    routers = list(adapter.routers.values())
    # (M, L, B, T, n): logits are a few numbers a token, so they are worked on for all routers at once.
    logits = torch.stack([torch.stack([t.decisions[r.name].logits for r in routers]) for t in traces])
    variance, fit = loss.new_zeros(()), loss.new_zeros(2)
    if by_policy:
        rollouts = Rollouts(
            logits=logits.requires_grad_(),
            chosen=torch.stack([torch.stack([t.decisions[r.name].chosen for r in routers]) for t in traces]),
            losses=torch.stack(losses),
            local=torch.tensor([r.local for r in routers], device=logits.device),
            mask=batch.mask,
        )
        if router.estimator == "control_variate":
            scale = adapter.config.scale * with_gradient / loss_scale  # from d(mean loss)/d(weight) to dL/dz
            rollouts.selection_gradients = scale * torch.stack(
                [torch.stack([_weight_gradient(t, r.name) for r in routers]) for t in traces[:with_gradient]]
            )
        surrogate, diagnostics = router_surrogate(router.estimator, rollouts, beta)
        (slopes,) = torch.autograd.grad(surrogate, logits)  # (M, L, B, T, n)
        for m, trace in enumerate(traces):
            for i, r in enumerate(routers):
                r.add_gradient(trace.decisions[r.name].inputs, slopes[m, i] * loss_scale)
        variance = diagnostics.advantage_variance
        fit = diagnostics.fit if diagnostics.fit is not None else fit
    with torch.no_grad():
        logits = logits.detach()
        return MicroResult(
            loss=torch.stack(losses).sum() / selections,
            entropy=(routing.entropy(logits) * batch.mask).sum(),
            ess=(routing.effective_support_size(logits.softmax(-1)) * batch.mask).sum(),
            decisions=batch.mask.sum() * (selections * len(routers)),
            advantage_variance=variance,
            fit=fit,
        )


def _weight_gradient(trace: Trace, router: str) -> Tensor:
    gradient = trace.decisions[router].weights.grad
    assert gradient is not None  # the trace asked for it and the backward pass has run
    return gradient


def dropout_seed(seed: tuple[int, int], first_row: int) -> int:
    """Seed of what else is random in the forward pass: a function of run seed, step and rows."""
    return int(np.random.SeedSequence([*seed, first_row]).generate_state(1)[0])
