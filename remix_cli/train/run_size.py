"""How large a run is: what it costs to train, before it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from remix_cli.data.splits import load_data
from remix_cli.models import load_tokenizer
from remix_cli.recipe import Recipe
from remix_cli.train.micro_batch import passes_of

BACKWARD = 2  # times the arithmetic of a forward pass


@dataclass(frozen=True)
class RunSize:
    steps: int
    rows_per_step: int
    tokens: int  # of all steps, each pass over a batch counted once
    held_out: int  # rows
    work: float  # the same with every pass, forward and backward: what runs of one model cost is about in proportion

    def describe(self) -> str:
        return f"{self.steps:,} steps of {self.rows_per_step} rows, {self.tokens:,} tokens"


def sizes_of(recipes: Sequence[Recipe]) -> list[RunSize]:
    """Of recipes with the same model and rows, which are read once. Raises DataError, StorageError."""
    most = max(recipes, key=lambda recipe: recipe.router.clusters)  # which asks most of the rows
    data = load_data(most, load_tokenizer(most.model))
    in_epoch: dict[int, int] = {}  # tokens, by rows per step
    sizes = []
    for recipe in recipes:
        per_step = recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps
        plan = replace(data.plan, rows_per_step=per_step)
        if per_step not in in_epoch:
            in_epoch[per_step] = sum(int(data.train.lengths[rows].sum()) for rows in plan.epoch(0))
        steps = replace(data, plan=plan).total_steps(recipe) if recipe.method.trains else 0
        tokens = round(in_epoch[per_step] * steps / plan.steps_per_epoch)
        sizes.append(RunSize(steps, per_step, tokens, len(data.validation.rows), tokens * _arithmetic(recipe)))
    return sizes


def _arithmetic(recipe: Recipe) -> int:
    """Of a step, in forward passes."""
    passes = passes_of(recipe.router, recipe.adapter_config().samples)
    return passes.total + BACKWARD * passes.with_gradient
