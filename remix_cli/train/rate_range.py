"""A learning-rate range test: one short training whose rate grows until it fails (Smith 2017, arXiv 1506.01186).

How it departs from the paper: the rate grows by a factor from step to step, not by a summand, so that few steps cover
decades. What is looked at is the training loss less the loss that the same rows had before any training: batches are
unlike, and what tells them apart would hide what the rate does. Only the LoRAs' rate grows; the router's stays as the
recipe has it. Nothing is written.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from rich.console import Console

from remix_cli.data.batches import Order
from remix_cli.errors import Interrupted, RecipeError
from remix_cli.evaluation.nll import row_losses
from remix_cli.recipe import Recipe
from remix_cli.recipe.schema import HIGHEST_RATE
from remix_cli.runs import RunFolder
from remix_cli.stored_json import Document
from remix_cli.train import prepare
from remix_cli.train.checkpoints import TrainingState
from remix_cli.train.console import TrainingConsole
from remix_cli.train.setup import Setup, set_up
from remix_cli.train.signals import Signals
from remix_cli.train.trainer import Trainer

FIRST, LAST = 1e-2, 1e3  # first and last rate, in the method's default rates
SMOOTHED = 3  # steps on either side of each that its smoothed value is the mean of
RUN_AWAY = 0.5  # nats above the loss before training


@dataclass(frozen=True)
class RatePoint:
    """After a step at this rate."""

    rate: float
    change: float  # of the loss since before training, on the step's rows, nats a token
    smoothed: float


@dataclass(frozen=True)
class RateRange:
    """What a range test has found. `steepest`: where the smoothed loss falls fastest against the rate's logarithm.

    `suggested`: half way from there to the lowest on a logarithmic scale. The former is too low for a run that is
    longer than the test, the latter about to fail.
    """

    points: list[RatePoint]
    steps: int  # that were planned; a loss that has run away ends the test
    router_rate: float | None  # None without a router that learns
    steepest: float | None  # None if the loss never fell
    lowest: float | None  # where the smoothed loss was lowest
    suggested: float | None

    @property
    def rates(self) -> list[float]:
        return [point.rate for point in self.points]

    @property
    def changes(self) -> list[float]:
        return [point.change for point in self.points]

    @property
    def smoothed(self) -> list[float]:
        return [point.smoothed for point in self.points]

    def to_dict(self) -> Document:
        return asdict(self)


def find_rate(recipe: Recipe, steps: int, console: Console) -> RateRange:
    """Train for at most `steps` steps from the method's hundredth default rate on. Raises as `train` does."""
    if not recipe.method.trains:
        raise RecipeError(f"adapter.method: {recipe.adapter.method} trains nothing, at whatever rate")
    prepare.check_recipe(recipe)
    accelerator = Accelerator(mixed_precision="fp16" if recipe.model.dtype == "float16" else "no")
    prepare.check_hardware(recipe, accelerator.device)
    if accelerator.num_processes > 1:
        raise RecipeError("a range test runs in one process; start it without `accelerate launch`")
    setup = set_up(recipe, RunFolder(Path(recipe.output_dir)), accelerator, {}, begins=True)
    with Signals() as signals, TrainingConsole(console, steps, 0, main=True, shown=[]) as view:
        changes, rates = _Rising(setup, steps, signals, view).measure()
    learns = bool(setup.routers) and not recipe.router.fixed and recipe.router.learning_rate > 0
    return read_off(changes, rates, steps, recipe.router.learning_rate if learns else None)


def read_off(changes: list[float], rates: list[float], steps: int, router_rate: float | None) -> RateRange:
    """What the changes of the loss (S,) after steps at these rates (S,) say."""
    smoothed = smooth(np.array(changes))
    points = [RatePoint(*map(float, one)) for one in zip(rates, changes, smoothed, strict=True)]
    lowest = int(smoothed.argmin())
    if lowest == 0 or smoothed[lowest] >= 0:
        return RateRange(points, steps, router_rate, None, None, None)
    slopes = np.gradient(smoothed, np.log(rates))
    steepest = int(slopes[: lowest + 1].argmin())
    between = math.sqrt(rates[steepest] * rates[lowest])
    return RateRange(points, steps, router_rate, rates[steepest], rates[lowest], float(f"{between:.2g}"))


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours, as many on one side as on the other."""
    last = len(values) - 1
    found = []
    for place in range(len(values)):
        reach = min(SMOOTHED, place, last - place)
        found.append(values[place - reach : place + reach + 1].mean())
    return np.array(found)


class _Rising(Trainer):
    """A run whose rate grows by a factor a step, and that keeps nothing."""

    def __init__(self, setup: Setup, steps: int, signals: Signals, view: TrainingConsole):
        super().__init__(setup, TrainingState(), None, signals, view)
        self.order = Order(replace(setup.data.plan, group_by_length=False))  # every batch is like the whole
        default = setup.recipe.method.learning_rate
        low, high = default * FIRST, min(default * LAST, HIGHEST_RATE)
        self.rates = [float(rate) for rate in np.geomspace(low, high, steps)]

    def measure(self) -> tuple[list[float], list[float]]:
        """Changes of the loss, and the rates of the steps that they come after. Raises Interrupted."""
        self._begin()
        before = self._losses_before()
        self.model.train()
        changes: list[float] = []
        for step in range(len(self.rates) + 1):
            rows = self.order.rows(step)
            sums, norms = self._gradients(step, rows)
            nats, tokens = before[rows].sum(0)
            change = float(sums.loss) - nats / tokens
            if step:
                changes.append(change)
            self.view.advance(step, float(sums.loss))
            if step == len(self.rates) or not all(map(math.isfinite, (change, *norms))) or _has_run_away(changes):
                break
            if sums.signals:
                raise Interrupted(self.signals.received, "interrupted; a range test keeps nothing")
            self._update(step, sums)
        finite = [change for change in changes if math.isfinite(change)]
        return finite, self.rates[: len(finite)]

    def _rates(self, step: int) -> tuple[float, float]:
        return self.rates[step], self.recipe.router.learning_rate

    def _losses_before(self) -> np.ndarray:
        """(rows, 2): nats and tokens of every row that the test will see, times its weight as in training; 0 for
        others."""
        seen = sorted({int(row) for step in range(len(self.rates) + 1) for row in self.order.rows(step)})
        rows = [self.setup.data.train.rows[number] for number in seen]
        found = np.zeros((len(self.setup.data.train.rows), 2))
        size = self.recipe.train.per_device_eval_batch_size
        losses = row_losses(self.model, self.adapter, rows, size)
        for number, row, loss in zip(seen, rows, losses, strict=True):
            found[number] = loss.nats * row.weight, loss.tokens * row.weight
        return found

    def _save(self) -> None:
        """Nothing is kept."""


def _has_run_away(changes: list[float]) -> bool:
    """Is the model so much worse than before training, three steps in a row, that higher rates tell nothing?"""
    return len(changes) > 2 and min(changes[-3:]) > RUN_AWAY
