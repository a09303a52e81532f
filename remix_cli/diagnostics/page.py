"""The routing of a run as one self-contained page: verdict, history, heat map, use by task, a view of tokens.

No script or style is loaded from anywhere; light and dark follow the reader's system.
"""

import html
import json
from typing import Any

from remix_cli.diagnostics.health import short_name
from remix_cli.diagnostics.history import History

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --soft: #6b6b6b; --line: #d5d5d5; }
@media (prefers-color-scheme: dark) { :root { --ink: #eaeaea; --paper: #16181c; --soft: #a0a0a0; --line: #3a3d44; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2.2rem; }
.verdict { font-size: 1.05rem; padding: .6rem .9rem; border-left: .3rem solid #0072B2; background: #0072b21a; }
.verdict.bad { border-color: #D55E00; background: #d55e001f; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
td, th { padding: .1rem .4rem; text-align: right; font-size: .8rem; font-weight: 400; } th { color: var(--soft); }
td.cell { min-width: 2.3rem; border: 1px solid var(--paper); }
.tokens { line-height: 2.1; } .tokens span { padding: .12rem .1rem; border-radius: .2rem; white-space: pre-wrap; }
.tokens span.prompt { opacity: .72; } small, .note { color: var(--soft); } select { font: inherit; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg .axis { stroke: var(--line); }
figure { display: inline-block; margin: 0 1.2rem 1rem 0; } figcaption { font-size: .85rem; color: var(--soft); }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const pick = document.getElementById("block"), out = document.getElementById("tokens");
const hues = [205, 26, 164, 327, 41, 202, 56, 275];
function show() {
  const block = Number(pick.value), order = new Map();
  for (const row of data.rows) for (const sets of row.sets) {
    const key = sets[block].join(" "); order.set(key, (order.get(key) || 0) + 1);
  }
  const rank = new Map([...order].sort((a, b) => b[1] - a[1]).map(([key], i) => [key, i]));
  out.replaceChildren(...data.rows.map(row => {
    const p = document.createElement("p"), name = document.createElement("small");
    p.className = "tokens"; name.textContent = row.task + "  "; p.append(name);
    row.tokens.forEach((text, t) => {
      const key = row.sets[t][block].join(" "), i = rank.get(key), span = document.createElement("span");
      span.textContent = text; span.className = t < row.prompt ? "prompt" : "";
      span.title = "LoRAs " + key + ", " + order.get(key) + " tokens";
      if (i < 8) span.style.background = `hsl(${hues[i]} 75% 50% / .38)`;
      p.append(span);
    });
    return p;
  }));
  const counts = [...order.values()], share = Math.max(...counts) / counts.reduce((a, b) => a + b);
  document.getElementById("sets").textContent =
    order.size + " sets; the commonest serves " + Math.round(100 * share) + " % of these tokens";
}
pick.addEventListener("change", show); show();
"""


def page(name: str, report: dict[str, Any], history: History | None, lines: list[dict[str, Any]]) -> str:
    """HTML of a run's report, its history if it was logged, and the token records of some rows."""
    state = "verdict" if report["healthy"] else "verdict bad"
    names = [short_name(block["name"]) for block in report["blocks"]]
    parts = [
        f"<h1>Routing of {html.escape(name)}</h1>",
        f'<p class="{state}">{html.escape(report["verdict"])}</p>',
        f'<p class="note">{report["tokens"]:,} tokens of {report["rows"]} rows, top {report["active"]} of '
        f"{report['pool_size']} LoRAs, {len(names)} blocks.</p>",
    ]
    if history is not None:
        parts += ["<h2>Over the steps of training</h2>", *_charts(history, report["active"])]
    parts += ["<h2>Use of each LoRA</h2>", _heat_map(report, names)]
    if len(report["tasks"]) > 1:
        parts += ["<h2>Use by task</h2>", _by_task(report, names)]
    if lines:
        options = "".join(f'<option value="{i}">{html.escape(short)}</option>' for i, short in enumerate(names))
        parts += [
            "<h2>Tokens</h2>",
            f'<p>Block <select id="block">{options}</select> <span id="sets" class="note"></span></p>',
            '<p class="note">One colour for each of the eight commonest sets of LoRAs; point at a token to read its '
            "set. Prompts are paler.</p>",
            '<div id="tokens"></div>',
            f'<script type="application/json" id="data">{_data(report, lines)}</script>',
            f"<script>{SCRIPT}</script>",
        ]
    title = f'<meta charset="utf-8"><title>Routing of {html.escape(name)}</title>'
    head = f'<head>{title}<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">{head}<body>\n{body}\n</body></html>\n'


def _heat_map(report: dict[str, Any], names: list[str]) -> str:
    head = "".join(f"<th>{i}</th>" for i in range(report["pool_size"]))
    rows = []
    for short, block in zip(names, report["blocks"], strict=True):
        cells = "".join(_cell(share) for share in block["share"])
        figures = f"{block['ess_weights']:.2f}", f"{block['entropy_share']:.2f}", str(len(block["dead"]) or "")
        more = "".join(f"<td>{figure}</td>" for figure in figures)
        rows.append(f"<tr><th>{html.escape(short)}</th>{cells}{more}</tr>")
    return (
        f'<div class="wide"><table><tr><th></th>{head}<th>ESS</th><th>H/ln n</th><th>dead</th></tr>{"".join(rows)}'
        '</table></div><p class="note">Share of tokens in %, ESS of the weights in use, entropy of q.</p>'
    )


def _by_task(report: dict[str, Any], names: list[str]) -> str:
    """How far each task's use of a block differs from that of all tasks together."""
    head = "".join(f"<th>{html.escape(task)}</th>" for task in report["tasks"])
    rows = []
    for short, block in zip(names, report["blocks"], strict=True):
        cells = []
        for shares in block["share_by_task"]:
            apart = sum(abs(a - b) for a, b in zip(shares, block["share"], strict=True)) / (2 * report["active"])
            cells.append(_cell(apart))
        rows.append(f"<tr><th>{html.escape(short)}</th>{''.join(cells)}<td>{block['task_information']:.3f}</td></tr>")
    return (
        f'<div class="wide"><table><tr><th></th>{head}<th>nats</th></tr>{"".join(rows)}</table></div>'
        '<p class="note">How much of a task\'s routing goes to other LoRAs than over all tasks, in %; and what the '
        "LoRA in use tells about the task, in nats.</p>"
    )


def _cell(share: float) -> str:
    """Darker is more, from nothing to blue; the number stands in it for whoever sees no colour."""
    ink = "color:#fff;" if share > 0.6 else ""
    return f'<td class="cell" style="{ink}background:rgb(0 90 160 / {share:.2f})">{100 * share:.0f}</td>'


def _charts(history: History, active: int) -> list[str]:
    panels = (
        ("ess_weights", "ESS of the weights, mean", float(active)),
        ("ess_weights_worst", "ESS of the weights, worst token", float(active)),
        ("router_entropy", "entropy of q, nats", max(history.values["router_entropy"]) or 1.0),
        ("dead_loras", "dead LoRAs", max(1.0, *history.values["dead_loras"])),
    )
    return [_chart(history.steps, history.values[key], title, top) for key, title, top in panels]


def _chart(steps: list[int], values: list[float], title: str, top: float) -> str:
    width, height, left, bottom = 230, 120, 30, 18
    span = max(1, steps[-1] - steps[0])
    across = [left + (step - steps[0]) / span * (width - left - 6) for step in steps]
    up = [height - bottom - value / top * (height - bottom - 8) for value in values]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, up, strict=True))
    told = f"{title}: {values[0]:.2f} to {values[-1]:.2f}"
    return (
        f'<figure><svg width="{width}" height="{height}" role="img" aria-label="{told}">'
        f'<path class="axis" fill="none" d="M{left} 8V{height - bottom}H{width - 6}"/>'
        f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="2"/>'
        f'<text x="{left - 4}" y="14" text-anchor="end">{top:.3g}</text>'
        f'<text x="{left - 4}" y="{height - bottom}" text-anchor="end">0</text>'
        f'<text x="{width - 6}" y="{height - 4}" text-anchor="end">step {steps[-1]}</text></svg>'
        f"<figcaption>{title}</figcaption></figure>"
    )


def _data(report: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        row = rows.setdefault(line["row"], {"task": line["task"], "tokens": [], "sets": [], "prompt": 0})
        row["tokens"].append(line["token"])
        row["prompt"] += line["part"] == "prompt"
        row["sets"].append([sorted(line["chosen"][block["name"]]) for block in report["blocks"]])
    text = json.dumps({"rows": list(rows.values())}, ensure_ascii=False)
    return text.replace("<", "\\u003c")  # a token may be </script>
