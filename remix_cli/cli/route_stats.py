"""`remix route-stats`."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from remix_cli.cli.common import AnyBase, Bars, Best, Json, Limit, RunPath
from remix_cli.errors import RecipeError
from remix_cli.terminal import Console


def route_stats(
    run: RunPath,
    data: Annotated[
        str | None, typer.Option(help="Rows in the recipe's first format; by default the held-out rows.")
    ] = None,
    limit: Limit = None,
    history: Annotated[bool, typer.Option("--history", help="Routing over the steps of training, no model.")] = False,
    headroom: Annotated[
        bool,
        typer.Option("--headroom", help="What routing by token is worth, and what a better choice could gain."),
    ] = False,
    compare_with: Annotated[
        Path | None, typer.Option("--compare", metavar="RUN", help="Beside another run, on this run's rows.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write figures, PNG and SVG.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every token's LoRAs, block by block, as JSON lines.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page: heat maps, history, tokens.")
    ] = None,
    fail_on_collapse: Annotated[
        bool, typer.Option("--fail-on-collapse", help="Exit 1 if a block's routing has collapsed.")
    ] = False,
    best: Best = False,
    any_base: AnyBase = False,
    as_json: Json = False,
) -> None:
    """Show how the routers choose: is it healthy, how decided, which LoRAs are used and for what."""
    from remix_cli.folders import RunFolder, check_run

    runs = [run] if compare_with is None else [run, compare_with]
    for folder in runs:
        if history:
            RunFolder(folder).check()
        else:
            check_run(folder, best=best)
    _check_places(page, trace, plot)
    from remix_cli.diagnostics import view

    console = Console(stderr=as_json)
    flags: dict[str, object]
    if headroom:
        flags = {"--history": history, "--compare": compare_with, "--plot": plot, "--trace": trace, "--html": page}
        flags |= {"--fail-on-collapse": fail_on_collapse}
        _refuse(flags, "cannot be combined with --headroom; ask for one after the other")
        _show_headroom(run, data, limit, best, any_base, as_json, console)
        return
    if history:
        flags = {"--data": data, "--limit": limit, "--trace": trace, "--html": page}
        flags |= {"--fail-on-collapse": fail_on_collapse, "--best": best, "--any-base": any_base}
        _refuse(flags, "is not read with --history, which loads no model; leave one of them out")
        shown = view.history(runs, plot, console.width)
    else:
        request = view.Request(data, limit, compare_with, plot, trace, page, best, any_base)
        with Bars() as bars:
            shown = view.routing(run, request, bars.start, console.width)
    if as_json:
        print(json.dumps(shown.document))
    else:
        for part in shown.parts:
            console.print(part, highlight=False, soft_wrap=str(part).startswith("written:"))
    if fail_on_collapse and not shown.healthy:
        print(f"error: {shown.document['verdict']}", file=sys.stderr)
        raise typer.Exit(1)


def _check_places(page: Path | None, trace: Path | None, plot: Path | None) -> None:
    """Raises RecipeError for a folder where a file is to be written, or the reverse."""
    for flag, file in {"--html": page, "--trace": trace}.items():
        if file is not None and os.path.isdir(file):
            raise RecipeError(f"{flag}: {file} is a folder; name a file to write")
    if plot is not None and os.path.exists(plot) and not os.path.isdir(plot):
        raise RecipeError(f"--plot: {plot} is a file; name a folder for the figures")


def _refuse(flags: Mapping[str, object], reason: str) -> None:
    """Raises RecipeError if one of `flags` is given."""
    for flag, value in flags.items():
        if value:
            raise RecipeError(f"{flag}: {reason}")


def _show_headroom(
    run: Path, data: str | None, limit: int | None, best: bool, any_base: bool, as_json: bool, console: Console
) -> None:
    from remix_cli.evaluation.headroom import measure_headroom
    from remix_cli.evaluation.score_tables import headroom_table

    with Bars() as bars:
        found = measure_headroom(run, data, limit, best=best, any_base=any_base, progress=bars.start)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    console.print(headroom_table(found))
    console.print(f"\n{found.verdict}", highlight=False)
