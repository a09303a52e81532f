"""A sweep's report as Rich tables of 80 columns."""

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from remix_cli.evaluation.score_tables import number, plain_table, with_unit
from remix_cli.evaluation.statistics import FEW, Score, too_few
from remix_cli.sweep.report import ArmReport, SweepReport

HELD_OUT = "held out"  # as evaluations call the recipe's own held-out rows


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
        title = _with_rows(name, report)
        table = plain_table(f"{title}: mean over seeds, and difference from {report.reference} (95 % intervals)")
        for column in ("arm", "runs", "score", "interval", "difference", "interval"):
            table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
        for arm in report.arms:
            if name in arm.scores:
                table.add_row(*_scores(arm, name))
        tables.append(table)
    return tables


def sweep_notes(report: SweepReport) -> list[str]:
    """The verdict in words: by the score that decides, then by the others; what it rests on, and what to mind."""
    lines = _decision(report) if report.decision and len(report.arms) > 1 else []
    for name in _names([arm.verdicts for arm in report.arms]):
        if report.decision and name == report.decision.score:
            continue
        lines.append(f"{_with_rows(name, report)}, against {report.reference}:")
        lines += [f"  {arm.arm}: {arm.verdicts[name]}" for arm in report.arms if name in arm.verdicts]
    known = [arm.held_out_rows for arm in report.arms if arm.held_out_rows is not None]
    if known:
        few = too_few(known[0])
        lines.append(f"settings chosen by {known[0]} held-out rows" + (f": {few}" if few else ""))
    return lines + _at_edges(report)


def _at_edges(report: SweepReport) -> list[str]:
    """A line for all arms that are alike in this."""
    arms: dict[str, list[str]] = {}
    for arm in report.arms:
        if arm.edges:
            advice = ", ".join(f"{value:g} in {key}" for key, value in arm.beyond.items())
            said = f"the best {', '.join(arm.edges)} lies at an edge of what was tried; try {advice}"
            arms.setdefault(said, []).append(arm.arm)
    return [f"{', '.join(names)}: {said}" for said, names in arms.items()]


def _decision(report: SweepReport) -> list[str]:
    decision = report.decision
    assert decision is not None
    scored = next(arm for arm in report.arms if arm.arm == decision.best).scores[decision.score]
    title = _with_rows(decision.score, report)
    lines = [f"{decision.best} is best by {title}: {with_unit(scored.value, scored.share)} ({_interval(scored)})"]
    lines += [f"  {arm}: {words}" for arm, words in decision.against.items()]
    if decision.take != decision.best:
        lines.append(f"take {decision.take}: nothing separates it from the best, and it is the first of those listed")
    elif len(decision.level) > 1:
        others = ", ".join(arm for arm in decision.level if arm != decision.take)
        lines.append(f"take {decision.take}, though nothing separates {others} from it")
    elif min(arm.runs for arm in report.arms) == 1:
        lines.append(
            f"take {decision.take} for now: it is ahead under one seed; more would say what training varies by"
        )
    elif scored.count < FEW:
        lines.append(f"take {decision.take} for now: it is ahead, on {scored.count} rows; give more, {FEW} at least")
    else:
        lines.append(f"take {decision.take}: it is clearly ahead of all others")
    return [*lines, _rests_on(report)]


def _rests_on(report: SweepReport) -> str:
    decision = report.decision
    assert decision is not None
    differences = [arm.differences[decision.score] for arm in report.arms if decision.score in arm.differences]
    rows = f"{differences[0].count:,} scored rows, " if differences else ""
    runs = [arm.runs for arm in report.arms]
    seeds = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    tokens = max(arm.train_tokens for arm in report.arms)
    said = f"this rests on {rows}{seeds} {'seed' if seeds == '1' else 'seeds'}, {tokens:,.0f} tokens of training each"
    if report.rows.get(decision.score.partition(" ")[0]) == HELD_OUT:
        said += "; the same rows chose the settings, so give eval.tasks rows of their own for a final figure"
    return said


def _with_rows(name: str, report: SweepReport) -> str:
    """`nll loss` of which rows: `nll loss (test.jsonl)`."""
    rows = report.rows.get(name.partition(" ")[0])
    return f"{name} ({rows})" if rows else name


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
