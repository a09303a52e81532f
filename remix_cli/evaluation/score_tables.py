"""Rich tables of evaluations and comparisons, made for 80 columns and for reading without colour."""

from typing import TYPE_CHECKING

from rich.table import Table

from remix_cli.evaluation.compare import ComparedScore, Comparison
from remix_cli.evaluation.report import Report

if TYPE_CHECKING:  # torch comes with it
    from remix_cli.evaluation.headroom import Headroom

NAMES = {"base": "The base model", "best": "The best adapter", "adapter": "The last adapter", "model": "The model"}


def eval_table(report: Report) -> Table:
    name, dash, how = report.model.partition("-")
    title = NAMES.get(name, name)
    if dash:
        title += f" ({how})"
    table = plain_table(title)
    for column in ("task", "score"):
        table.add_column(column)
    for column in ("value", "95 % interval", "rows"):
        table.add_column(column, justify="right")
    for result in report.results:
        for name, score in result.scores.items():
            interval = f"{number(score.low, score.share)} to {number(score.high, score.share)}"
            table.add_row(result.title, name, with_unit(score.value, score.share), interval, str(score.count))
    return table


def eval_stamp(report: Report) -> str:
    """One line per task: what was asked, how, and of what; the whole stamp is in the report."""
    lines = []
    for result in report.results:
        asked = result.protocol.asked
        shown_as = "chat template" if asked.chat_template else "plain text"
        lines.append(
            f"{result.task}: {asked.decoding}, {asked.shots} shots, {asked.protocol or shown_as}, "
            f"data {asked.data[:8]}, prompts {asked.prompts[:8]}"
        )
    model = report.results[0].protocol.answered_by
    adapter = f", adapter {model.adapter[:8]}" if model.adapter else ""
    lines.append(f"{model.model}, {model.dtype}, {model.device}, routing: {model.routing}{adapter}")
    return "\n".join(lines)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """One table of the runs, one of the scores; differences are paired, from the first run."""
    runs = plain_table("Runs")
    for column in ("run", "trained", "active", "training", "tokens"):
        runs.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for run in comparison.runs:
        runs.add_row(
            run.run,
            _count(run.trained_parameters),
            _count(run.active_parameters),
            "-" if run.train_seconds is None else f"{run.train_seconds:,.0f} s",
            _count(run.train_tokens),
        )
    scores = plain_table("Scores, and paired differences from the first (95 % intervals over the items)")
    for column in ("task", "score", "run", "value", "difference", "interval"):
        scores.add_column(column, justify="left" if column in ("task", "score", "run") else "right", overflow="fold")
    for task, compared in comparison.tasks.items():
        for name, entries in compared.scores.items():
            heading = [f"{compared.title(task)}, {compared.items} rows", name]
            for run, entry in zip(comparison.runs, entries, strict=True):
                scores.add_row(*heading, run.run, with_unit(entry.value, entry.share), *_difference_cells(entry))
                heading = ["", ""]
    return [runs, scores]


def _difference_cells(entry: ComparedScore) -> tuple[str, str]:
    """A difference from the first run, and its interval; empty for that run itself."""
    difference = entry.difference
    if difference is None:
        return "", ""
    low = number(difference.low, entry.share, sign=True)
    high = number(difference.high, entry.share, sign=True)
    return number(difference.value, entry.share, sign=True), f"{low} to {high}"


def headroom_table(found: "Headroom") -> Table:
    """The losses by choice, and how far each is from the top k's."""
    table = plain_table(f"Held-out loss by how the LoRAs are chosen ({found.rows} rows, nats a token)")
    for column in ("choice", "loss", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "choice" else "right")
    for choice in found.choices:
        cells = ["", ""]
        if choice.difference is not None:
            low = number(choice.difference.low, share=False, sign=True)
            high = number(choice.difference.high, share=False, sign=True)
            cells = [number(choice.difference.value, share=False, sign=True), f"{low} to {high}"]
        table.add_row(choice.name, number(choice.loss.value, share=False), *cells)
    return table


def plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False)


def number(value: float, share: bool, sign: bool = False) -> str:
    """A share in per cent, anything else to four places; `sign`: with a plus if there is no minus."""
    plus = "+" if sign else ""
    if share:
        return f"{100 * value:{plus}.2f}"
    return f"{value:{plus}.4f}"


def with_unit(value: float, share: bool) -> str:
    unit = " %" if share else ""
    return number(value, share) + unit


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
