"""`remix validate`."""

import json
from typing import Annotated

import typer

from remix_cli.cli.common import Json, Overrides, RecipePath
from remix_cli.terminal import Console


def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="How many will train together: steps, sharded memory.")] = 1,
    as_json: Json = False,
) -> None:
    """Check a recipe without training: keys, files, targets; show one row, parameters and memory."""
    from remix_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from remix_cli.train.preview import preview, print_preview

    found = preview(loaded, processes)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print_preview(found, Console())
