"""Rich tables, made for 80 columns and for reading without colour."""

import re
from typing import Any

from rich.table import Table

from remix_cli.stats.parameters import ParameterCounts


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


def short_name(name: str) -> str:
    """`model.layers.12.mlp` -> `12.mlp`."""
    found = re.search(r"(\d+)\.(.+)$", name)
    return f"{found.group(1)}.{found.group(2)}" if found else name


def parameter_table(counts: ParameterCounts) -> Table:
    table = Table(title="Parameters", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    rows = [
        ("A matrices", counts.lora_a, ""),
        ("B matrices", counts.lora_b, ""),
        ("routers", counts.router, ""),
        ("trained", counts.trained, f"{100 * counts.trained / counts.base:.2f} % of the base model"),
        ("active per token", counts.active, "k of n LoRAs, and the routers"),
        ("base, frozen", counts.base, ""),
    ]
    for label, number, note in rows:
        table.add_row(label, f"{number:,}", note)
    return table
