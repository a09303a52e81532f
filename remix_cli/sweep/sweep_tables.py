"""A sweep's report as Rich tables of 80 columns."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from remix_cli.evaluation.score_tables import number, plain_table, with_unit
from remix_cli.evaluation.statistics import FEW, Score, too_few
from remix_cli.sweep.report import ArmReport, SweepReport
from remix_cli.sweep.words import HELD_OUT, HELD_OUT_LOSS, how_many, metric_in_words, score_in_words
from remix_cli.train.lines import say


def sweep_tables(report: SweepReport) -> list[Table]:
    """What each arm is and costs; then its scores, and how far they are from the first arm's."""
    tables = [_costs(report)]
    for name in _names([arm.scores for arm in report.arms]):
        title = score_in_words(name, report.rows)
        table = plain_table(f"{title}\nmean over seeds, and difference from {report.reference} (95 % intervals)")
        for column in ("arm", "runs", "score", "interval", "difference", "interval"):
            table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
        for arm in report.arms:
            if name in arm.scores:
                table.add_row(*_scores(arm, name))
        tables.append(table)
    return tables


def print_report(report: SweepReport, console: Console) -> None:
    """Tables, what their columns are, and the verdict."""
    costs, *scores = sweep_tables(report)
    console.print(costs)
    for line in cost_notes(report):
        say(console, line)
    for table in scores:
        console.print()
        console.print(table)
    console.print()
    for line in sweep_notes(report):
        say(console, line)
    if report.skipped:
        say(console, f"not in these tables: {'; '.join(report.skipped)}")


def _costs(report: SweepReport) -> Table:
    metric = metric_in_words(report.metric)
    table = plain_table("Arms at their best setting (chosen on held-out rows)")
    for column in ("arm", "setting", "\n".join(metric.split()), "trained", "active", "seconds", "GiB"):
        table.add_column(column, justify="left" if column in ("arm", "setting") else "right", overflow="fold")
    if report.base is not None:
        table.add_row("base model", "-", f"{report.base:.4f}", "", "", "", "")
    for arm in report.arms:
        table.add_row(
            arm.arm,
            _setting(arm),
            "-" if arm.validation is None else f"{arm.validation:.4f}",
            f"{arm.trained_parameters:,}",
            f"{arm.active_parameters:,}",
            f"{arm.train_seconds:,.0f}",
            f"{arm.peak_memory_gib:.1f}",
        )
    return table


def cost_notes(report: SweepReport) -> list[str]:
    """What the columns of the first table are; to be read below it."""
    if not report.arms:
        return []
    what = HELD_OUT_LOSS if report.metric == "eval_loss" else f"{report.metric}, on held-out rows while training"
    runs = [arm.validation_runs for arm in _trained(report)]
    lines = [f"{what}: after the last step, mean over {how_many(runs, 'seed')}"]
    if report.base is not None:
        lines[0] += "; the base model's before the first"
    return [*lines, "seconds: of the quickest run by the clock, whatever else the machine was doing"]


def _trained(report: SweepReport) -> list[ArmReport]:
    """The arms that seeds say something of; all, if none was trained."""
    return [arm for arm in report.arms if arm.trained_parameters] or report.arms


def sweep_notes(report: SweepReport) -> list[str]:
    """The verdict in words: by the score that decides, then by the others; what it rests on, and what to mind."""
    lines = _decision(report) if report.decision and len(report.arms) > 1 else []
    for name in _names([arm.verdicts for arm in report.arms]):
        if report.decision and name == report.decision.score:
            continue
        lines.append(f"{score_in_words(name, report.rows)}, against {report.reference}:")
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
    title = score_in_words(decision.score, report.rows)
    rows = _scored_rows(report)
    lines = [f"{decision.best} is best by {title}: {with_unit(scored.value, scored.share)} ({_interval(scored)})"]
    lines += [f"  {arm}: {words}" for arm, words in decision.against.items()]
    if decision.take != decision.best:
        lines.append(f"take {decision.take}: nothing separates it from the best, and it is the first of those listed")
    elif len(decision.level) > 1:
        others = ", ".join(arm for arm in decision.level if arm != decision.take)
        lines.append(f"take {decision.take}, though nothing separates {others} from it")
    elif min(arm.runs for arm in _trained(report)) == 1:
        lines.append(
            f"take {decision.take} for now: it is ahead under one seed; more would say what training varies by"
        )
    elif rows is not None and rows < FEW:
        lines.append(f"take {decision.take} for now: it is ahead, on {rows} rows; give more, {FEW} at least")
    else:
        lines.append(f"take {decision.take}: it is clearly ahead of all others")
    return [*lines, _rests_on(report)]


def _rests_on(report: SweepReport) -> str:
    decision = report.decision
    assert decision is not None
    count = _scored_rows(report)
    rows = "" if count is None else f"{count:,} scored rows, "
    seeds = how_many([arm.runs for arm in _trained(report)], "seed")
    tokens = max(arm.train_tokens for arm in report.arms)
    said = f"this rests on {rows}{seeds}, {tokens:,.0f} tokens of training each"
    if report.rows.get(decision.score.partition(" ")[0]) == HELD_OUT:
        said += "; the same rows chose the settings, so give eval.tasks rows of their own for a final figure"
    return said


def _scored_rows(report: SweepReport) -> int | None:
    """That the decision rests on; a score over seeds counts runs, a difference rows. None without a difference."""
    decision = report.decision
    assert decision is not None
    counts = [arm.differences[decision.score].count for arm in report.arms if decision.score in arm.differences]
    return counts[0] if counts else None


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
