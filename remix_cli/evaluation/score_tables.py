"""Rich tables of evaluations and comparisons, made for 80 columns and for reading without colour."""

from typing import Any

from rich.table import Table

NAMES = {"base": "The base model", "best": "The best adapter", "adapter": "The last adapter", "model": "The model"}


def eval_table(report: dict[str, Any]) -> Table:
    name, *how = report["model"].split("-", 1)
    title = NAMES.get(name, name) + (f" ({how[0]})" if how else "")
    table = plain_table(title)
    for column in ("task", "score"):
        table.add_column(column)
    for column in ("value", "95 % interval", "rows"):
        table.add_column(column, justify="right")
    for result in report["results"]:
        for score, value in result["scores"].items():
            share = score in result["shares"]
            low, high = result["intervals"][score]
            interval = f"{number(low, share)} to {number(high, share)}"
            unit = " %" if share else ""
            table.add_row(result["task"], score, number(value, share) + unit, interval, str(result["counts"][score]))
    return table


def eval_stamp(report: dict[str, Any]) -> str:
    """One line per task: what was asked, how, and of what; the whole stamp is in the report."""
    lines = []
    for result in report["results"]:
        p = result["protocol"]
        chat = p.get("protocol") or ("chat template" if p["chat_template"] else "plain text")
        lines.append(
            f"{result['task']}: {p['decoding']}, {p['shots']} shots, {chat}, data {p['data'][:8]}, "
            f"prompts {p['prompts'][:8]}"
        )
    p = report["results"][0]["protocol"]
    adapter = f", adapter {p['adapter'][:8]}" if p["adapter"] else ""
    lines.append(f"{p['model']}, {p['dtype']}, {p['device']}, routing: {p['routing']}{adapter}")
    return "\n".join(lines)


def comparison_tables(found: dict[str, Any]) -> list[Table]:
    """One table of the runs, one of the scores; differences are paired, from the first run."""
    runs = plain_table("Runs")
    for column in ("run", "trained", "active", "training", "tokens"):
        runs.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for run in found["runs"]:
        seconds = run["train_seconds"]
        runs.add_row(
            run["run"],
            _count(run["trained_parameters"]),
            _count(run["active_parameters"]),
            "-" if seconds is None else f"{seconds:,.0f} s",
            _count(run["train_tokens"]),
        )
    scores = plain_table("Scores, and paired differences from the first (95 % intervals over the items)")
    for column in ("task", "score", "run", "value", "difference", "interval"):
        scores.add_column(column, justify="left" if column in ("task", "score", "run") else "right", overflow="fold")
    for task, result in found["tasks"].items():
        for score, entries in result["scores"].items():
            for run, entry in zip(found["runs"], entries, strict=True):
                share = entry["share"]
                difference, interval = "", ""
                if "difference" in entry:
                    low, high = entry["difference_interval"]
                    difference = number(entry["difference"], share, sign=True)
                    interval = f"{number(low, share, sign=True)} to {number(high, share, sign=True)}"
                first = entry is entries[0]
                unit = " %" if share else ""
                scores.add_row(
                    f"{task} ({result['items']})" if first else "",
                    score if first else "",
                    run["run"],
                    number(entry["value"], share) + unit,
                    difference,
                    interval,
                )
    return [runs, scores]


def headroom_table(document: dict[str, Any]) -> Table:
    """The losses of a headroom report, and how far each is from the top k's."""
    table = plain_table(f"Held-out loss by how the LoRAs are chosen ({document['rows']} rows, nats a token)")
    for column in ("choice", "loss", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "choice" else "right")
    for row in document["choices"]:
        difference, interval = "", ""
        if row["difference"] is not None:
            value, low, high = (row["difference"][key] for key in ("value", "low", "high"))
            difference = number(value, share=False, sign=True)
            interval = f"{number(low, share=False, sign=True)} to {number(high, share=False, sign=True)}"
        table.add_row(row["choice"], number(row["loss"]["value"], share=False), difference, interval)
    return table


def plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False)


def number(value: float, share: bool, sign: bool = False) -> str:
    return f"{100 * value:{'+' if sign else ''}.2f}" if share else f"{value:{'+' if sign else ''}.4f}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
