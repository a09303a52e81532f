"""`remix validate` of a base that is out of reach, off line or not allowed to be fetched yet, by its published shape.

Then there is no tokenizer either, so no row is read, and the longest batch is as long as the recipe allows.
"""

from dataclasses import dataclass

from rich.console import Console

from remix_cli.diagnostics.parameters import ParameterCounts, count_parameters
from remix_cli.models import known_base, out_of_reach
from remix_cli.recipe import Recipe
from remix_cli.stored_json import Document
from remix_cli.train.lines import say
from remix_cli.train.memory import estimate_memory
from remix_cli.train.micro_batch import passes_of
from remix_cli.train.prepare import check_recipe
from remix_cli.train.preview import describe_model, describe_taken, print_size


@dataclass(frozen=True)
class ShapeEstimate:
    """What can be said of a run by the shape of its base, without a tokenizer."""

    recipe: Recipe
    tokens_per_row: int  # that every row is taken to have
    rows_per_step: int
    passes: int  # forward passes over each row of a step
    counts: ParameterCounts
    memory: dict[str, float]  # GiB by what it is for

    def to_dict(self) -> Document:
        return {
            "base": "shape known, weights not looked at",
            "tokens_per_row": self.tokens_per_row,
            "rows_per_step": self.rows_per_step,
            "passes": self.passes,
            "model": self.recipe.model.model_dump(),
            "parameters": self.counts.to_dict(),
            "memory_gib": self.memory,
            "estimator": self.recipe.router.estimator,
        }


def by_known_shape(recipe: Recipe) -> Recipe | None:
    """The recipe with its base by the published shape, if that is known and the base itself is out of reach."""
    base = known_base(recipe.model)
    if base is None or not out_of_reach(recipe.model):
        return None
    return recipe.model_copy(update={"model": base})


def estimate_by_shape(recipe: Recipe, processes: int = 1) -> ShapeEstimate:
    """As `processes` processes would train it on rows of `data.max_length` tokens. Reads no row and no weight.

    Raises RecipeError for what else is wrong with the recipe.
    """
    adapter = check_recipe(recipe)
    counts, longest = count_parameters(adapter), recipe.data.max_length
    return ShapeEstimate(
        recipe,
        longest,
        recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * processes,
        passes_of(recipe.router, recipe.adapter_config().samples).total,
        counts,
        estimate_memory(recipe, adapter.model, counts, longest, processes),
    )


def print_estimate(found: ShapeEstimate, console: Console) -> None:
    """What the shape of the base alone tells."""
    recipe = found.recipe
    for line in (
        describe_model(recipe.model, found.counts),
        "base      shape known, weights not looked at: out of reach, here and on the hub",
        f"rows      not looked at without a tokenizer: {found.tokens_per_row} tokens each (data.max_length)",
        f"method    {recipe.adapter.method}: {recipe.method.summary}",
        f"steps     of {found.rows_per_step} rows each{describe_taken(found.passes)}",
    ):
        say(console, line)
    print_size(found.counts, found.memory, console)
