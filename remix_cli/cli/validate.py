"""`remix validate`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from remix_cli.cli.common import Json, Overrides, RecipePath
from remix_cli.terminal import Console

if TYPE_CHECKING:
    from remix_cli.recipe import Recipe


def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="How many will train together: steps, sharded memory.")] = 1,
    as_json: Json = False,
) -> None:
    """Check a recipe without training: keys, files, targets; show one row, parameters and memory."""
    from remix_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from remix_cli.train.by_shape import by_known_shape, estimate_by_shape, print_estimate

    shaped = by_known_shape(loaded)
    if shaped is None:
        show_preview(loaded, processes, as_json=as_json)
        return
    found = estimate_by_shape(shaped, processes)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        print_estimate(found, Console())


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
