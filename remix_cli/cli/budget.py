"""`remix budget`."""

import json
from typing import Annotated

import typer

from remix_cli.cli.common import Json, Overrides, RecipePath
from remix_cli.errors import RecipeError
from remix_cli.terminal import Console


def budget(
    recipe: RecipePath,
    overrides: Overrides = None,
    parameters: Annotated[
        int | None, typer.Option(min=1, help="Target; by default what the recipe itself has.")
    ] = None,
    count: Annotated[str, typer.Option(help="What to equalise: active (per token) or trained.")] = "active",
    as_json: Json = False,
) -> None:
    """How large each method must be to have as many parameters, routers counted."""
    from remix_cli.recipe import load_recipe

    if count not in ("active", "trained"):
        raise RecipeError(f"--count: {count!r} is not known; use active or trained")
    loaded = load_recipe(recipe, overrides or [])
    from remix_cli.diagnostics.routing_tables import budget_table
    from remix_cli.train.budget import solve_budget

    target, sizes = solve_budget(loaded, parameters, count)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({"target": target, "count": count, "methods": [size.to_dict() for size in sizes]}))
        return
    Console().print(budget_table(target, count, sizes))
