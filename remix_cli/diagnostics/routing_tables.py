"""Rich tables, made for 80 columns and for reading without colour."""

from typing import Any

from rich.table import Table
from rich.text import Text

from remix_cli.core.step_routing import DEAD_SHARE
from remix_cli.diagnostics.health import short_name
from remix_cli.diagnostics.history import MEASURES, History, sparkline
from remix_cli.diagnostics.parameters import ParameterCounts


def routing_legend(report: dict[str, Any]) -> str:
    even = 100 * report["active"] / report["pool_size"]
    return (
        "H/ln n  entropy of q, 1 = uniform\n"
        "ESS q   LoRAs that q really spreads over, mean over tokens; worst: the smallest\n"
        "ESS w   the same for the weights in use\n"
        "sets    different selections that occurred; top: tokens served by the commonest\n"
        f"use %   tokens that each LoRA serves ({even:.0f} if even, 99 = 99 or more)\n"
        "dead    LoRAs that serve fewer than 1 % of the tokens"
    )


def routing_table(report: dict[str, Any]) -> Table:
    n, k = report["pool_size"], report["active"]
    table = Table(
        title=f"Routing of {report['tokens']:,} tokens ({report['rows']} rows), top {k} of {n} LoRAs",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("block")
    for column in ("H/ln n", "ESS q", "worst", "ESS w", "sets", "top"):
        table.add_column(column, justify="right")
    table.add_column("use % of LoRA 0 .. " + str(n - 1))
    table.add_column("dead", justify="right")
    for block in report["blocks"]:
        table.add_row(
            short_name(block["name"]),
            f"{block['entropy_share']:.2f}",
            f"{block['ess_q']:.2f}",
            f"{block['ess_q_worst']:.2f}",
            f"{block['ess_weights']:.2f}",
            str(block["distinct_sets"]),
            f"{block['commonest_set']:.2f}",
            " ".join(f"{min(99, 100 * share):2.0f}" for share in block["share"]),
            str(len(block["dead"])) if block["dead"] else "-",
        )
    return table


SHADES = " ░▒▓█"


def heat_map(report: dict[str, Any], width: int) -> str:
    """Share of tokens by LoRA (down) and block (across), in five shades: blank is unused, full is every token."""
    blocks = report["blocks"]
    wide = 2 if 2 * len(blocks) + 10 <= width else 1
    lines = [f"Share of tokens, {len(blocks)} blocks across, blank = dead, {SHADES[1:]} by quarters to every token"]
    for i in range(report["pool_size"]):
        cells = "".join(SHADES[_shade(block["share"][i])] * wide for block in blocks[: width - 10])
        lines.append(f"LoRA {i:>2}  {cells}")
    return "\n".join(lines)


def _shade(share: float) -> int:
    """0 for dead, then quarters."""
    if share < DEAD_SHARE:
        return 0
    return min(4, 1 + int(share * 4))


def history_table(histories: list[History], width: int = 80) -> Table:
    """Each measure over the steps, one line per run, on one scale."""
    table = Table(title=f"Routing over {histories[0].steps[-1]} steps", title_justify="left", box=None, pad_edge=False)
    table.add_column("measure")
    if len(histories) > 1:
        table.add_column("run", overflow="fold")
    table.add_column("first", justify="right")
    table.add_column("")
    table.add_column("last", justify="right")
    for key, label in MEASURES.items():
        highest = max(max(history.values[key]) for history in histories)
        for i, history in enumerate(histories):
            values = history.values[key]
            line = sparkline(values, 0.0, highest, max(12, width - 64))
            run = [history.run] if len(histories) > 1 else []
            table.add_row(label if i == 0 else "", *run, f"{values[0]:.2f}", line, f"{values[-1]:.2f}")
    return table


# What the table per block leaves out, or compares best as one number.
MEANS = {
    "entropy_share": "H/ln n, entropy of q",
    "ess_weights": "ESS of the weights in use",
    "chosen_mass": "mass of q on the chosen LoRAs",
    "margin": "margin, last chosen to first left out",
    "agreement": "share of the top k in a sampled selection",
    "load_variation": "load: deviation / mean of the shares",
    "commonest_set": "tokens served by the commonest set",
    "dead": "dead LoRAs",
    "dominating": "LoRAs serving 95 % or more",
    "token_information": "information on the token, nats",
    "class_information": "information on number, word, punctuation",
    "part_information": "information on prompt or completion",
    "task_information": "information on the task",
    "similarity": "cosine between the LoRAs' updates, mean",
    "similarity_most": "the same, most alike",
}


def means_table(reports: list[dict[str, Any]], names: list[str]) -> Table:
    """Means over the blocks of one report, or of several on the same rows."""
    table = Table(title="Means over the blocks", title_justify="left", box=None, pad_edge=False)
    table.add_column("measure")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for key, label in MEANS.items():
        values = []
        for report in reports:
            values.append(_mean(report["blocks"], key))
        table.add_row(label, *values)
    return table


def _mean(blocks: list[dict[str, Any]], key: str) -> str:
    """Of a measure over the blocks that have it; of how many LoRAs there are, where it is a list of them."""
    found = []
    for block in blocks:
        value = block[key]
        if isinstance(value, list):
            value = len(value)
        if value is not None:
            found.append(value)
    if not found:
        return "-"
    return f"{sum(found) / len(found):.3f}"


def parameter_table(counts: ParameterCounts) -> Table:
    table = Table(title="Parameters", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    rows = [
        ("A matrices", counts.lora_a, ""),
        ("B matrices", counts.lora_b, ""),
        ("other", counts.other, ""),
        ("routers", counts.router, ""),
        ("trained", counts.trained, f"{100 * counts.trained / counts.base:.2f} % of the base model"),
        ("active per token", counts.active, "k of n LoRAs, and the routers" if counts.active < counts.trained else ""),
        ("base, frozen", counts.base, ""),
    ]
    for label, number, note in rows:
        if number or label in ("trained", "active per token"):
            table.add_row(label, f"{number:,}", note)
    return table


def budget_table(target: int, count: str, sizes: list[Any]) -> Table:
    """Each method at the size nearest to the target."""
    table = Table(title=f"Sizes for {target:,} {count} parameters", title_justify="left", box=None, pad_edge=False)
    for column in ("method", "setting", "kept", "trained", "active", "of target"):
        table.add_column(column, justify="left" if column in ("method", "setting", "kept") else "right")
    for size in sizes:
        if size.problem:
            table.add_row(size.method, Text(size.problem, overflow="fold"))
            continue
        setting = f"{size.knob}: {size.value}" if size.knob else "no size to choose"
        share = size.count(count) / target
        near = f"{100 * share:.1f} %"
        table.add_row(size.method, setting, size.fixed, f"{size.trained:,}", f"{size.active:,}", near)
    return table
