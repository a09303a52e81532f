"""`remix sweep`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remix_cli.cli.common import AllowCode, Json, Overrides
from remix_cli.streams import outlive
from remix_cli.terminal import Console

if TYPE_CHECKING:
    from remix_cli.recipe.sweep_grammar import Sweep


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
    from remix_cli.recipe.sweep_grammar import load_sweep

    console = Console(stderr=as_json)
    plan = load_sweep(recipe, overrides or [], only)
    if dry_run:
        _list_runs(plan, console)
        _say_how_many(plan, console)
        return
    outlive(f"the sweep goes on; its runs and their logs are in {plan.folder}")
    _say_how_many(plan, console)
    from remix_cli.sweep.report import sweep_report
    from remix_cli.sweep.runner import run_sweep
    from remix_cli.sweep.sweep_tables import sweep_notes, sweep_tables

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    run_sweep(plan, processes, say, allow_code)
    found = sweep_report(plan.folder)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    for table in sweep_tables(found):
        console.print()
        console.print(table)
    console.print()
    for line in sweep_notes(found):
        say(line)
    say(f"\nagain, without training: remix compare {plan.folder}")


def _list_runs(plan: "Sweep", console: Console) -> None:
    from remix_cli.recipe.sweep_grammar import describe

    more = len(plan.seeds) - 1
    for arm, points in plan.points.items():
        console.print(f"{arm}: {len(points)} settings, then the best under {more} more seeds", highlight=False)
        for point in points:
            console.print(f"    {describe(point.setting) or '-':<40} {point.folder}", highlight=False, soft_wrap=True)


def _say_how_many(plan: "Sweep", console: Console) -> None:
    arms = len(plan.points)
    searched = sum(len(points) for points in plan.points.values())
    more = (len(plan.seeds) - 1) * arms
    console.print(f"{arms} arms, {searched} runs to search, {more} more", highlight=False)
