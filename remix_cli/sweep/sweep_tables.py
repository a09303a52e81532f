"""A sweep's report as Rich tables of 80 columns."""

from typing import Any

from rich.table import Table

from remix_cli.evaluation.score_tables import number, plain_table
from remix_cli.evaluation.statistics import too_few


def sweep_tables(report: dict[str, Any]) -> list[Table]:
    """What each arm is and costs; then its scores, and how far they are from the first arm's."""
    costs = plain_table("Arms at their best setting (chosen on held-out rows)")
    columns = ("arm", "setting", "held out", "trained", "active", "seconds", "GiB")
    for column in columns:
        costs.add_column(column, justify="left" if column in ("arm", "setting") else "right", overflow="fold")
    for arm in report["arms"]:
        held = "-" if arm["validation"] is None else f"{arm['validation']:.4f}"
        shown = arm["setting"]
        for setting in arm["edges"]:
            shown = shown.replace(setting, f"{setting} (edge)")
        costs.add_row(
            arm["arm"],
            shown.replace(", ", "\n") or "-",
            held,
            f"{arm['trained_parameters']:,}",
            f"{arm['active_parameters']:,}",
            f"{arm['train_seconds']:,.0f}",
            f"{arm['peak_memory_gib']:.1f}",
        )
    tables = [costs]
    names = list(dict.fromkeys(name for arm in report["arms"] for name in arm["scores"]))
    for name in names:
        table = plain_table(f"{name}: mean over seeds, and difference from {report['reference']} (95 % intervals)")
        for column in ("arm", "runs", "score", "interval", "difference", "interval"):
            table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
        for arm in report["arms"]:
            if name in arm["scores"]:
                table.add_row(*_scores(arm, name))
        tables.append(table)
    return tables


def sweep_notes(report: dict[str, Any]) -> list[str]:
    """The verdicts in words, and what to mind about them."""
    lines = []
    for name in dict.fromkeys(name for arm in report["arms"] for name in arm["verdicts"]):
        lines.append(f"{name}, against {report['reference']}:")
        lines += [f"  {arm['arm']}: {arm['verdicts'][name]}" for arm in report["arms"] if name in arm["verdicts"]]
    for arm in report["arms"]:
        if arm["edges"]:
            lines.append(
                f"{arm['arm']}: the best {', '.join(arm['edges'])} lies at an edge of what was tried; try beyond it"
            )
    rows = next((arm["held_out_rows"] for arm in report["arms"] if arm["held_out_rows"] is not None), None)
    if rows is not None:
        few = too_few(rows)
        lines.append(f"settings chosen by {rows} held-out rows" + (f": {few}" if few else ""))
    return lines


def _scores(arm: dict[str, Any], name: str) -> list[str]:
    score, difference = arm["scores"][name], arm["differences"].get(name)
    share = score["share"]
    unit = " %" if share else ""
    cells = [arm["arm"], str(arm["runs"]), number(score["value"], share) + unit, _interval(score)]
    if difference is None:
        return [*cells, "", ""]
    return [*cells, number(difference["value"], share, sign=True), _interval(difference, sign=True)]


def _interval(score: dict[str, Any], sign: bool = False) -> str:
    if score["low"] is None:
        return "-"
    return " to ".join(number(score[end], score["share"], sign) for end in ("low", "high"))
