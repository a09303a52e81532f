"""`remix compare`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from remix_cli.cli.common import Json
from remix_cli.terminal import Console


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Evaluated runs, reports such as RUN/eval/base.json, or one sweep."),
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
    from remix_cli.sweep.report import is_sweep

    if len(runs) == 1 and is_sweep(runs[0]):
        _compare_arms(runs[0], as_json)
    else:
        _compare_runs(runs, as_json)


def _compare_arms(sweep: Path, as_json: bool) -> None:
    from remix_cli.sweep.report import sweep_report
    from remix_cli.sweep.sweep_tables import print_report

    report = sweep_report(sweep)
    if as_json:
        print(json.dumps(report.to_dict()))
        return
    print_report(report, Console())


def _compare_runs(runs: list[Path], as_json: bool) -> None:
    from remix_cli.evaluation.compare import compare as paired
    from remix_cli.evaluation.score_tables import comparison_tables
    from remix_cli.train.lines import say

    comparison = paired(runs)
    if as_json:
        print(json.dumps(comparison.to_dict()))
        return
    console = Console()
    for table in comparison_tables(comparison):
        console.print(table)
        console.print()
    if comparison.skipped:
        say(console, f"skipped {'; '.join(comparison.skipped)}")
