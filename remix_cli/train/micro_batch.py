"""A recipe's words to the library's step: which passes a batch takes, and the gradients of one micro-batch."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from remix_cli.core.estimators.base import Estimator, Numbers
from remix_cli.core.estimators.registry import ESTIMATORS
from remix_cli.core.patch import Adapter
from remix_cli.core.step import BatchInputs, MicroResult, Passes, accumulate_gradients, plan_passes
from remix_cli.core.trace import Seed
from remix_cli.data.batches import Batch
from remix_cli.models import batch_losses
from remix_cli.recipe.schema import Router as RouterRecipe

# The targets of a step for a batch that only keeps this process in step with the others: its losses and gradients,
# divided by it, are exactly 0.
COUNTS_NOTHING = math.inf


def passes_of(router: RouterRecipe, samples: bool, loras_learn: bool = True) -> Passes:
    """`samples`: does the method sample at all? `loras_learn`: or are they frozen?"""
    return plan_passes(
        router.estimator,
        selections=router.selections,
        lora_gradient=router.lora_gradient,
        fixed=router.fixed,
        learns=router.learning_rate > 0,
        samples=samples,
        loras_learn=loras_learn,
    )


def describe_router(router: RouterRecipe) -> str:
    """How the router of a method that samples is trained, in a line."""
    if router.fixed:
        return "fixed: the top k of its random start, in one pass a batch; router.fixed: false trains it"
    passes = passes_of(router, samples=True)
    sampled = f", M = {passes.samples}" if passes.samples else ""
    beside = "; the LoRAs learn from a pass under the top k" if passes.top else ""
    return f"{router.estimator}{sampled}: {ESTIMATORS[router.estimator].summary}{beside}"


def accumulate_batch(
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
    """Add the gradients of one micro-batch, on the device already; see `core.step.accumulate_gradients`.

    `targets_in_step`: the weights of all targets of the step added up, which is their number where all are 1.
    """
    balance: float | Tensor = 0.0
    if router.balance and not adapter.config.samples:
        targets = len(batch.targets) if batch.weights is None else batch.weights.sum()
        balance = router.balance * (targets / targets_in_step)  # this micro-batch's share of the step
    return accumulate_gradients(
        adapter,
        lambda: batch_losses(model, batch) / targets_in_step,
        BatchInputs(batch.rows, batch.mask, batch.prompt),
        passes_of(router, adapter.config.samples, adapter.loras_learn),
        estimator,
        seed=seed,
        numbers=numbers,
        backward=backward,
        loss_scale=loss_scale,
        balance=balance,
        dropout_seed=dropout_seed,
    )


class EagerGradients:
    """`accumulate_batch` for one run, run as it stands; `step_graphs.StepGraphs` records and replays it."""

    drops_gradients = True  # between steps; recorded ones keep their place and are zeroed

    def __init__(
        self,
        adapter: Adapter,
        router: RouterRecipe,
        estimator: Estimator,
        device: torch.device,
        backward: Callable[[Tensor], None],
        loss_scale: Callable[[], float],
    ):
        self.adapter, self.router, self.estimator = adapter, router, estimator
        self.device, self.backward, self.loss_scale = device, backward, loss_scale

    def accumulate(self, batch: Batch, targets_in_step: float, seed: tuple[int, int]) -> MicroResult:
        """Add the gradients of a batch that is still on the host."""
        return accumulate_batch(
            self.adapter.model,
            self.adapter,
            batch.to(self.device),
            self.router,
            self.estimator,
            targets_in_step=targets_in_step,
            seed=seed,
            numbers=self.estimator.numbers(),
            backward=self.backward,
            loss_scale=self.loss_scale(),
            dropout_seed=seed_of_dropout(seed, batch.first_row),
        )


def seed_of_dropout(seed: tuple[int, int], first_row: int) -> int:
    """A function of run seed, step and rows."""
    return int(np.random.SeedSequence([*seed, first_row]).generate_state(1)[0])
