"""`remix validate`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from remix_cli.cli.common import Json, Overrides, RecipePath
from remix_cli.terminal import Console

if TYPE_CHECKING:
    from remix_cli.recipe import Recipe
    from remix_cli.train.budget import ShapeEstimate


def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="How many will train together: steps, sharded memory.")] = 1,
    as_json: Json = False,
) -> None:
    """Check a recipe without training: keys, files, targets; show one row, parameters and memory."""
    from remix_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from remix_cli.train.budget import by_known_shape, estimate_by_shape

    shaped = by_known_shape(loaded)
    if shaped is None:
        show_preview(loaded, processes, as_json=as_json)
    else:
        _show_estimate(estimate_by_shape(shaped, processes), as_json)


def _show_estimate(found: "ShapeEstimate", as_json: bool) -> None:
    """What the shape of the base alone tells."""
    from remix_cli.diagnostics.routing_tables import parameter_table
    from remix_cli.train.preview import taken

    if as_json:
        print(json.dumps(found.to_dict()))
        return
    console = Console()
    model = found.recipe.model
    bits = "" if model.quantization == "none" else f", weights in {model.quantization}"
    for line in (
        f"model     {model.name_or_path}, {found.counts.base:,} parameters, {model.dtype}{bits}",
        "base      shape known, weights not looked at: out of reach, here and on the hub",
        f"rows      not looked at without a tokenizer: {found.tokens_per_row} tokens each (data.max_length)",
        f"method    {found.recipe.adapter.method}: {found.recipe.method.summary}",
        f"steps     of {found.rows_per_step} rows each{taken(found.passes)}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    console.print(parameter_table(found.counts))
    console.print("\nMemory on one device, estimated, GiB:", highlight=False)
    for name, value in [*found.memory.items(), ("together", sum(found.memory.values()))]:
        console.print(f"  {name:<34}{value:8.2f}", highlight=False)


def show_preview(
    recipe: "Recipe", processes: int = 1, *, resume: bool = False, overwrite: bool = False, as_json: bool = False
) -> None:
    """What training with these flags would do."""
    from remix_cli.train.preview import preview, print_preview

    found = preview(recipe, processes, resume=resume, overwrite=overwrite)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print_preview(found, Console())
