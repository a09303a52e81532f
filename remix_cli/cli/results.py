"""Commands that start from a finished run: eval, compare, route-stats."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from remix_cli.cli.common import AllowCode, AnyBase, Bars, Best, Json, Limit, RunPath, app
from remix_cli.errors import RecipeError
from remix_cli.tasks.registry import TASKS
from remix_cli.terminal import Console


@app.command("eval")
def evaluate(
    run: RunPath,
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(TASKS)}; by default the recipe's eval.tasks."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Score this file instead of the recipe's rows.")] = None,
    data_format: Annotated[
        str | None, typer.Option(help="Of --data, as in recipes: gsm8k, arc ...; by default as the recipe's rows.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the unadapted base model the same way.")] = False,
    limit: Limit = None,
    shots: Annotated[
        int | None, typer.Option(min=0, max=64, help="Solved examples in front; needs --shots-from.")
    ] = None,
    shots_from: Annotated[str | None, typer.Option(help="File whose first rows are the solved examples.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="humaneval: answers per problem, for pass@k.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; else as the task says.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=5, help="Of the answers; 0 is greedy.")] = None,
    active: Annotated[
        str | None, typer.Option(metavar="K,K...", help="Activate so many LoRAs instead of the trained k.")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="top, or sample as in training (the paper's ablation); by default the recipe's.")
    ] = None,
    allow_code: AllowCode = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modelling code that a model folder brings along.")
    ] = False,
    best: Best = False,
    any_base: AnyBase = False,
    as_json: Json = False,
) -> None:
    """Score a run, or a model folder: held-out loss, GSM8K, ARC, HumanEval, reasoning-gym tasks.

    Every answer is kept in RUN/eval; an interrupted evaluation goes on where it was.
    """
    from remix_cli.folders import RunFolder, check_run

    folder = RunFolder(run)
    if not folder.is_model:
        check_run(run, best=best)
    from remix_cli.evaluation.evaluator import check_code
    from remix_cli.evaluation.evaluator import evaluate as score
    from remix_cli.evaluation.request import (
        all_bring_rows,
        refuse_flags_of_an_adapter,
        requested_active,
        requested_tasks,
    )
    from remix_cli.runs import load_model_folder, load_run
    from remix_cli.tasks.base import Settings

    console = Console(stderr=as_json)
    if selection not in (None, "top", "sample"):
        raise RecipeError(f"--selection: {selection!r} is not known; use top or sample")
    recipe = folder.load_recipe()  # whatever is wrong with the flags shows before the model loads
    if folder.is_model and not (task and (data or all_bring_rows(task))):
        raise RecipeError(f"{run}: a model, not a run: say what to score with --task and --data")
    flags = {"--active": active, "--selection sample": selection == "sample", "--best": best}
    if base:
        refuse_flags_of_an_adapter(flags, "--base takes it away; leave one of them out")
    if folder.is_model:
        refuse_flags_of_an_adapter(flags | {"--any-base": any_base}, "a model folder has none; leave it out")
    elif trust_code:
        raise RecipeError(
            "--trust-remote-code: is for a model folder; whether a run's base model may run its code is "
            f"model.trust_remote_code in {folder.recipe}"
        )
    sampled = (selection or recipe.eval.selection) == "sample"
    settings = Settings(base=base or folder.is_model, limit=limit, sampled=sampled, allow_code=allow_code)
    changes = {"shots": shots, "samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    tasks = requested_tasks(recipe, task, data, changes, shots_from, data_format)
    many = requested_active(active, recipe.adapter_config(), settings.sampled)
    check_code(tasks, settings)
    is_model = folder.is_model
    loaded = load_model_folder(run, trust_code=trust_code) if is_model else load_run(run, best=best, any_base=any_base)
    with Bars() as bars:
        reports = [score(loaded, tasks, replace(settings, active=k), bars.start) for k in many]
    if as_json:
        for line in (line for report in reports for line in report["notes"]):
            console.print(line, highlight=False, soft_wrap=True)
        print(json.dumps(reports[0] if len(reports) == 1 else {"reports": reports}))
        return
    for report in reports:
        _show(report, console)


def _show(report: dict[str, Any], console: Console) -> None:
    from remix_cli.evaluation.score_tables import eval_stamp, eval_table

    for line in report["notes"]:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(eval_table(report))
    console.print(eval_stamp(report), highlight=False)
    console.print(f"written: {report['file']} and every answer beside it", highlight=False, soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Evaluated runs, reports such as RUN/eval/base.json, or one sweep."),
    ],
    as_json: Json = False,
) -> None:
    """Compare evaluated runs on the same items: paired differences with 95 % intervals.

    One sweep's folder instead: its arms over seeds.
    """
    from remix_cli.folders import report_file

    for run in runs:
        if len(runs) > 1 or not os.path.exists(run):  # one alone may be a sweep
            report_file(run)
    from remix_cli.sweep.report import is_sweep, sweep_report
    from remix_cli.sweep.sweep_tables import sweep_notes, sweep_tables

    if len(runs) == 1 and is_sweep(runs[0]):
        report = sweep_report(runs[0])
        if as_json:
            print(json.dumps(report))
            return
        for table in sweep_tables(report):
            Console().print(table)
            print()
        for line in sweep_notes(report):
            Console().print(line, highlight=False, soft_wrap=True)
        for line in report["skipped"]:
            Console().print(f"skipped {line}", highlight=False)
        return
    from remix_cli.evaluation.compare import compare as paired
    from remix_cli.evaluation.score_tables import comparison_tables

    found = paired(runs)
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    for table in comparison_tables(found):
        console.print(table)
        console.print()
    for line in found["skipped"]:
        console.print(f"skipped {line}", highlight=False)


@app.command("route-stats")
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

    for folder in [run] if compare_with is None else [run, compare_with]:
        if history:
            RunFolder(folder).check()
        else:
            check_run(folder, best=best)
    for flag, file in {"--html": page, "--trace": trace}.items():
        if file is not None and os.path.isdir(file):
            raise RecipeError(f"{flag}: {file} is a folder; name a file to write")
    if plot is not None and os.path.exists(plot) and not os.path.isdir(plot):
        raise RecipeError(f"--plot: {plot} is a file; name a folder for the figures")
    from remix_cli.diagnostics import view

    console = Console(stderr=as_json)
    if headroom:
        others = {"--history": history, "--compare": compare_with, "--plot": plot, "--trace": trace, "--html": page}
        wrong = next(
            (flag for flag, value in (others | {"--fail-on-collapse": fail_on_collapse}).items() if value), None
        )
        if wrong:
            raise RecipeError(f"{wrong}: cannot be combined with --headroom; ask for one after the other")
        _headroom(run, data, limit, best, any_base, as_json, console)
        return
    if history:
        flags = {"--data": data, "--limit": limit, "--trace": trace, "--html": page}
        flags |= {"--fail-on-collapse": fail_on_collapse, "--best": best, "--any-base": any_base}
        unread = next((flag for flag, value in flags.items() if value), None)
        if unread:
            raise RecipeError(f"{unread}: is not read with --history, which loads no model; leave one of them out")
        runs = [run] if compare_with is None else [run, compare_with]
        shown = view.history(runs, plot, console.width)
    else:
        with Bars() as bars:
            request = view.Request(data, limit, compare_with, plot, trace, page, best, any_base)
            shown = view.routing(run, request, bars.start, console.width)
    if as_json:
        print(json.dumps(shown.document))
    for part in [] if as_json else shown.parts:
        console.print(part, highlight=False, soft_wrap=str(part).startswith("written:"))
    if fail_on_collapse and not shown.healthy:
        print(f"error: {shown.document['verdict']}", file=sys.stderr)
        raise typer.Exit(1)


def _headroom(
    run: Path, data: str | None, limit: int | None, best: bool, any_base: bool, as_json: bool, console: Console
) -> None:
    from remix_cli.data.chunks import start_size
    from remix_cli.diagnostics import view
    from remix_cli.evaluation import headroom
    from remix_cli.evaluation.score_tables import headroom_table
    from remix_cli.runs import load_run
    from remix_cli.storage import write_json

    loaded = load_run(run, best=best, any_base=any_base)
    config = loaded.adapter.config
    if not config.samples:
        raise RecipeError(f"{run}: {config.method}, {config.active} of {config.pool_size}: no choice to compare with")
    rows = view.rows_to_look_at(loaded, data, limit or headroom.ROWS)
    size = start_size(loaded.recipe.eval.batch_size, loaded.device)
    with Bars() as bars:
        choices = headroom.headroom(loaded, rows, size, bars.start("headroom", headroom.PASSES * len(rows)).advance)
    document = headroom.headroom_document(choices, len(rows))
    write_json(loaded.folder.statistics / f"headroom-{loaded.which}.json", document)
    if as_json:
        print(json.dumps(document))
        return
    console.print(headroom_table(document))
    console.print(f"\n{document['verdict']}", highlight=False)
