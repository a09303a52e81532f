"""A sweep's report as Rich tables of 80 columns."""

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from remix_cli.evaluation.score_tables import number, plain_table, with_unit
from remix_cli.evaluation.statistics import Score, too_few
from remix_cli.sweep.report import ArmReport, SweepReport


def sweep_tables(report: SweepReport) -> list[Table]:
    """What each arm is and costs; then its scores, and how far they are from the first arm's."""
    costs = plain_table("Arms at their best setting (chosen on held-out rows)")
    for column in ("arm", "setting", "held out", "trained", "active", "seconds", "GiB"):
        costs.add_column(column, justify="left" if column in ("arm", "setting") else "right", overflow="fold")
    for arm in report.arms:
        costs.add_row(
            arm.arm,
            _setting(arm),
            "-" if arm.validation is None else f"{arm.validation:.4f}",
            f"{arm.trained_parameters:,}",
            f"{arm.active_parameters:,}",
            f"{arm.train_seconds:,.0f}",
            f"{arm.peak_memory_gib:.1f}",
        )
    tables = [costs]
    for name in _names([arm.scores for arm in report.arms]):
        table = plain_table(f"{name}: mean over seeds, and difference from {report.reference} (95 % intervals)")
        for column in ("arm", "runs", "score", "interval", "difference", "interval"):
            table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
        for arm in report.arms:
            if name in arm.scores:
                table.add_row(*_scores(arm, name))
        tables.append(table)
    return tables


def sweep_notes(report: SweepReport) -> list[str]:
    """The verdicts in words, and what to mind about them."""
    lines = []
    for name in _names([arm.verdicts for arm in report.arms]):
        lines.append(f"{name}, against {report.reference}:")
        lines += [f"  {arm.arm}: {arm.verdicts[name]}" for arm in report.arms if name in arm.verdicts]
    for arm in report.arms:
        if arm.edges:
            lines.append(f"{arm.arm}: the best {', '.join(arm.edges)} lies at an edge of what was tried; try beyond it")
    known = [arm.held_out_rows for arm in report.arms if arm.held_out_rows is not None]
    if known:
        few = too_few(known[0])
        lines.append(f"settings chosen by {known[0]} held-out rows" + (f": {few}" if few else ""))
    return lines


def _names(of_arms: Sequence[Mapping[str, object]]) -> list[str]:
    """Every name that an arm has, each once, in the order in which they come."""
    names: list[str] = []
    for of_arm in of_arms:
        names += [name for name in of_arm if name not in names]
    return names


def _setting(arm: ArmReport) -> str:
    """One key a line; those at an edge of what was tried are marked."""
    shown = arm.setting
    for setting in arm.edges:
        shown = shown.replace(setting, f"{setting} (edge)")
    return shown.replace(", ", "\n") or "-"


def _scores(arm: ArmReport, name: str) -> list[str]:
    score = arm.scores[name]
    cells = [arm.arm, str(arm.runs), with_unit(score.value, score.share), _interval(score)]
    if name not in arm.differences:
        return [*cells, "", ""]
    difference = arm.differences[name]
    return [*cells, number(difference.value, score.share, sign=True), _interval(difference, sign=True)]


def _interval(score: Score, sign: bool = False) -> str:
    if not math.isfinite(score.low):
        return "-"
    return f"{number(score.low, score.share, sign)} to {number(score.high, score.share, sign)}"
