"""`remix sweep`."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remix_cli.cli.common import AllowCode, Json, Overrides
from remix_cli.errors import RecipeError, RemixError
from remix_cli.streams import outlive
from remix_cli.terminal import Console
from remix_cli.train.lines import shows_progress

if TYPE_CHECKING:
    from remix_cli.recipe.sweep_grammar import Sweep
    from remix_cli.sweep.outcome import Outcome


def sweep(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Any recipe, or one with lists of values, see docs/sweeps.md.")
    ],
    overrides: Overrides = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many, where the file says none; by default 3.")] = None,
    hours: Annotated[
        float | None, typer.Option(min=0, help="As many seeds (10 at most) as fit into so many hours from now.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at once; they are dealt to the GPUs in turn.")] = 1,
    only: Annotated[
        str | None, typer.Option(metavar="REGEX", help="These arms; others that were run before stay in the table.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Which is best on my data? Search settings, repeat the best under all seeds, compare, decide.

    A recipe without lists and without a sweep section: one LoRA against a pool under a fixed, a clustered and a trained
    router, three learning rates each. The same command goes on where it was stopped.
    """
    from remix_cli.recipe.sweep_grammar import load_sweep

    if seeds is not None and hours is not None:
        raise RecipeError("--seeds, --hours: one says how many seeds, the other lets the time decide; give one of them")
    console = Console(stderr=as_json)
    from remix_cli.train.lines import say as say_on

    def say(line: str) -> None:
        say_on(console, line)

    wanted, flag = (1, "--hours") if hours is not None else (seeds, "--seeds")
    plan = load_sweep(recipe, overrides or [], only, wanted, flag)
    if dry_run:
        _list_runs(plan, say)
    _say_how_many(plan, say, hours)
    if dry_run:
        _look_at_rows(plan, say)
        return
    outlive(f"the sweep goes on; its runs and their logs are in {plan.folder}")
    from remix_cli.sweep.outcome import write_outcome
    from remix_cli.sweep.report import sweep_report
    from remix_cli.sweep.runner import run_sweep
    from remix_cli.sweep.sweep_tables import print_report

    with console.status("reading the rows") if shows_progress(console) else nullcontext() as status:
        run_sweep(plan, processes, say, allow_code, hours, lambda line: _show(status, line))
    found = sweep_report(plan.folder)
    outcome = write_outcome(plan, found)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    console.print()
    print_report(found, console)
    if outcome is not None:
        _say_what_next(plan, outcome, console)


def _show(status: Any, line: str) -> None:
    """On a terminal or in a notebook, one line that moves; in a log nothing."""
    if status is not None:
        status.update(line)


def _list_runs(plan: "Sweep", say: Any) -> None:
    """Each with its folder inside the sweep's."""
    from remix_cli.recipe.sweep_grammar import describe

    for arm, points in plan.points.items():
        say(f"{arm}: {len(points)} setting{'s' if len(points) > 1 else ''}")
        for point in points:
            say(f"    {describe(point.setting) or '-'}\n      {point.folder.relative_to(plan.folder)}")


def _say_how_many(plan: "Sweep", say: Any, hours: float | None) -> None:
    arms = len(plan.points)
    searched = sum(len(points) for points in plan.points.values())
    trained = sum(points[0].recipe.method.trains for points in plan.points.values())
    more = (len(plan.seeds) - 1) * trained
    lines = [f"{arms} arms: {', '.join(plan.points)}", f"{searched} runs to search"]
    if hours is not None:
        lines[-1] += f", then the best of each arm under as many seeds as {hours:g} hours hold"
    elif more:
        under = "seed" if len(plan.seeds) == 2 else "seeds"
        lines[-1] += f", then {more} more: the best of each arm under {under} {', '.join(map(str, plan.seeds[1:]))}"
    lines += [f"folder: {plan.folder}", "stop whenever you like; the same command goes on"]
    for line in lines:
        say(line)


def _look_at_rows(plan: "Sweep", say: Any) -> None:
    """Of a dry run: are the runs that are there this sweep's? How large are its own, if rows are at hand?

    Raises RecipeError.
    """
    from remix_cli.sweep.runner import check_same_recipes, say_sizes, with_formats

    try:
        plan = with_formats(plan)
    except RemixError as error:
        _say_unknown(error, say)
        return
    check_same_recipes(plan)
    try:
        say_sizes(plan, say)
    except RemixError as error:
        _say_unknown(error, say)
    else:
        say("how long they take is measured over the first steps")


def _say_unknown(error: RemixError, say: Any) -> None:
    say(f"how large they are is not known: {'; '.join(error.problems)}")


def _say_what_next(plan: "Sweep", outcome: "Outcome", console: Console) -> None:
    lines = {
        "use it as it is": f"remix export {outcome.run} --output FOLDER",
        "train its recipe, with more rows or steps": f"remix train {outcome.recipe}",
        "read this again": f"remix compare {plan.folder}",
    }
    if outcome.spelt_out is not None:
        lines["go on, with more arms, seeds or rates in this file"] = f"remix sweep {outcome.spelt_out}"
    for purpose, line in lines.items():
        console.print(f"\n# {purpose}\n{line}", highlight=False, soft_wrap=True)  # to be copied whole
