"""Commands that start from a recipe: train, sweep, budget, validate, schema; and verify-estimator, which needs none."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from remix_cli.cli.common import AllowCode, Json, Overrides, RecipePath, app, launch_rank
from remix_cli.errors import RecipeError
from remix_cli.streams import outlive
from remix_cli.terminal import Console


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest valid checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run that output_dir holds.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as the recipe says.

    On several GPUs: accelerate launch -m remix_cli train RECIPE
    """
    console = Console(stderr=as_json)
    if resume and overwrite:
        raise RecipeError("--resume, --overwrite: one goes on with the run, the other replaces it; give one of them")
    from remix_cli.recipe import load_recipe

    stored = False
    if resume:
        recipe, stored = _from_where_it_was_begun(recipe, console)
    loaded = load_recipe(recipe, overrides or [], stored=stored)
    from remix_cli.train.loop import train as run_training

    outlive(f"training goes on; its log is {loaded.output_dir}/metrics.jsonl")
    summary = run_training(loaded, console, resume=resume, overwrite=overwrite)
    if launch_rank() != 0:
        return
    if as_json:
        print(json.dumps(summary))
        return
    best = summary["best_eval_loss"]
    console.print(
        f"done: {summary['steps']} steps in {summary['seconds']:.0f} s"
        + (f", best held-out loss {best:.4f} at step {summary['best_step']}" if best is not None else "")
        + f"; adapter in {loaded.output_dir}/adapter",
        highlight=False,
        soft_wrap=True,
    )


def _from_where_it_was_begun(recipe: Path, console: Console) -> tuple[Path, bool]:
    """Go to the folder from which the paths of a run's own recipe count; the recipe as it is called there, and whether
    it is a run's own."""
    from remix_cli.folders import RunFolder

    folder = RunFolder(recipe.parent)
    begun_in = folder.begun_in() if recipe == folder.recipe and recipe.is_file() else None
    if begun_in is None or begun_in.samefile(Path.cwd()):
        return recipe, begun_in is not None
    if launch_rank() == 0:
        console.print(f"paths count from {begun_in}, where the run was begun", highlight=False, soft_wrap=True)
    recipe = recipe.absolute()
    os.chdir(begun_in)
    return recipe, True


@app.command()
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


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe with lists of values, see docs/sweeps.md.")],
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at once; they are dealt to the GPUs in turn.")] = 1,
    only: Annotated[
        str | None, typer.Option(metavar="REGEX", help="These arms; others that were run before stay in the table.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Train a grid of settings or methods, choose on held-out rows, test the best under all seeds, tabulate.

    The same command goes on where it was stopped.
    """
    from remix_cli.recipe.sweep_grammar import describe, load_sweep

    console = Console(stderr=as_json)
    plan = load_sweep(recipe, overrides or [], only)
    if not dry_run:
        outlive(f"the sweep goes on; its runs and their logs are in {plan.folder}")
    searched = sum(map(len, plan.points.values()))
    more = len(plan.seeds) - 1
    for arm, points in plan.points.items() if dry_run else ():
        console.print(f"{arm}: {len(points)} settings, then the best under {more} more seeds", highlight=False)
        for point in points:
            console.print(f"    {describe(point.setting) or '-':<40} {point.folder}", highlight=False, soft_wrap=True)
    console.print(
        f"{len(plan.points)} arms, {searched} runs to search, {more * len(plan.points)} more", highlight=False
    )
    if dry_run:
        return
    from remix_cli.sweep.report import sweep_report
    from remix_cli.sweep.runner import run_sweep
    from remix_cli.sweep.sweep_tables import sweep_notes, sweep_tables

    run_sweep(plan, processes, lambda line: console.print(line, highlight=False, soft_wrap=True), allow_code)
    found = sweep_report(plan.folder)
    if as_json:
        print(json.dumps(found))
        return
    for table in sweep_tables(found):
        console.print()
        console.print(table)
    console.print()
    for line in sweep_notes(found):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\nagain, without training: remix compare {plan.folder}", highlight=False, soft_wrap=True)


@app.command()
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


@app.command("verify-estimator")
def verify_estimator(as_json: Json = False) -> None:
    """Prove the router's gradient: exact bias by enumeration, variance relative to the paper's.

    Two to four minutes on two cores. Exits 1 if an estimator that claims to be unbiased is not.
    """
    from dataclasses import asdict

    from remix_cli.verify.exact import exact_biases
    from remix_cli.verify.variance import variance_ratios
    from remix_cli.verify.verify_tables import bias_table, variance_table

    console = Console(stderr=as_json)
    biases = exact_biases()
    ratios = variance_ratios()
    sound = all(bias.holds for bias in biases)
    if as_json:
        print(json.dumps({"sound": sound, "bias": [*map(asdict, biases)], "variance": [*map(asdict, ratios)]}))
    else:
        console.print(bias_table(biases))
        console.print()
        console.print(variance_table(ratios))
    if not sound:
        names = ", ".join(bias.arm for bias in biases if not bias.holds)
        print(f"error: not unbiased although it claims to be: {names}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from remix_cli.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
