"""The README of an exported folder: what it is, what it was made from, what it scores, what it is not."""

import json
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

import remix_cli
from remix_cli.evaluation.report import read_report
from remix_cli.methods.registry import method_named
from remix_cli.recipe import Source
from remix_cli.runs import LoadedRun

PEFT = """
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)
```
"""
SELECTED = """The model of ONE prompt: the LoRAs that every router chose for it, and no others. With routing by sequence
that is exact for the answer to this prompt; another prompt would choose others. `selection.json` has the choice.
"""

BY_SEQUENCE = """## Scoring it, serving it

It routes by sequence: the prompt chooses once, for the whole answer. `generate` does so. In a call that gets prompt and
answer together, as lm-evaluation-harness makes one for each likelihood, all tokens count as the prompt: the answer
takes part in the choice, and such likelihoods are not the trained model's. `remix eval RUN --lm-eval TASKS` measures
those. Engines that lay sequences end to end, such as vLLM and SGLang, cannot run it; `transformers serve` can, without
continuous batching.
"""

KINDS = {
    "hf": """The model as trained, routing included. Needs transformers, torch and safetensors; no other package:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```
""",
    "peft-merged": """An APPROXIMATION: one stock PEFT LoRA in place of the routed pool. The trained model chooses its
LoRAs anew for every token; this one applies their best fixed combination. What that costs is measured below.
"""
    + PEFT,
    "peft": f"The adapter as trained, in PEFT's format.\n{PEFT}",
    "selected": SELECTED,
    "peft-selected": SELECTED + PEFT,
    "merged-exactly": """An ordinary checkpoint with the LoRA merged into its weights: the model as trained, to the
rounding of its type. It can be converted and served like any other model of its architecture.
""",
    "merged": """An APPROXIMATION: an ordinary checkpoint with one LoRA merged into its weights in place of the routed
pool. The trained model chooses its LoRAs anew for every token; this one applies their best fixed combination. What
that costs is measured below. It can be converted and served like any other model of its architecture.
""",
    "merged-paths": """An APPROXIMATION: an ordinary checkpoint with one LoRA merged into the weights of each layer. The
trained model also has paths from the layers before, which no weights of one layer hold; this is the nearest that does.
What that costs is measured below. It can be converted and served like any other model of its architecture.
""",
}


def card(run: LoadedRun, kind: str, price: dict[str, float]) -> str:
    """Markdown with the hub's metadata block. `price`: measured on held-out rows, for the approximations."""
    c, base = run.stored.config, run.recipe.model.name_or_path
    base = _shown(base)
    hub_id = base if "/" in base else None
    tags = ["remix", "lora", *([f"base_model:adapter:{hub_id}"] if hub_id else [])]
    head = [
        "---",
        f"library_name: {'peft' if kind.startswith('peft') else 'transformers'}",
        "pipeline_tag: text-generation",
    ]
    licence = _licence(run.recipe.model.name_or_path)
    head += [f"license: {licence}"] if licence else []
    head += [f"base_model: {hub_id}"] if hub_id else []
    head += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    data = ", ".join(map(_rows_of, run.recipe.data.train))
    facts = [
        f"- base model: {base} (fingerprint {run.identity.base_fingerprint[:16]}); its licence applies"
        + (f" ({licence})" if licence else ""),
        *_method(run),
        f"- data: {data}",
        f"- adapter: {run.which}, sha256 {run.stored.weights_sha256[:16]}",
    ]
    parts = [
        "\n".join(head),
        f"# {base.rstrip('/').rpartition('/')[2]}, finetuned with {method_named(c.method).title or c.method}",
        KINDS[kind],
        "\n".join(facts),
    ]
    if price:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in price.items())
        parts.append(f"## What the approximation costs\n\n| on held-out rows | |\n|---|---|\n{rows}")
    if kind == "hf" and c.level == "sequence":
        parts.append(BY_SEQUENCE)
    parts += _scores(run) + _routing(run)
    return "\n\n".join(parts) + "\n"


def _rows_of(source: Source) -> str:
    if source.path is None:
        return f"reasoning-gym {source.reasoning_gym}"
    return ", ".join(map(_shown, source.paths))


def _method(run: LoadedRun) -> list[str]:
    c, version = run.stored.config, remix_cli.__version__
    method = method_named(c.method)
    if not c.routed:
        return [f"- method: {c.method}, {method.summary}; remix {version}"]
    return [
        f"- method: {method.title or c.method} ({_paper(method.summary)}), remix {version}: "
        f"{c.active} of {c.pool_size} LoRAs of rank {c.rank} for each {'token' if c.level == 'token' else 'sequence'}, "
        f"each weighted by omega = {c.scale:.6g}, on {', '.join(c.target_modules)}; one router per {c.scope}",
        f"- router: {_router(run)}",
    ]


def _paper(summary: str) -> str:
    """The paper that the summary of a method names, as a link."""
    number = re.search(r"arXiv (\d+\.\d+)", summary)
    return f"[arXiv {number[1]}](https://arxiv.org/abs/{number[1]})" if number else summary


def _router(run: LoadedRun) -> str:
    router = run.recipe.router
    return "fixed, the top k of its random start" if router.fixed else f"{router.estimator}, M = {router.selections}"


def _licence(base: str) -> str | None:
    """What the base model's own card says, in its folder or in the hub's cache; nothing is fetched."""
    readme = Path(base) / "README.md"
    if not readme.is_file():
        cached = None if Path(base).exists() or base.count("/") != 1 else try_to_load_from_cache(base, "README.md")
        if not isinstance(cached, str):
            return None
        readme = Path(cached)
    found = re.search(r"^license:\s*([\w.-]+)\s*$", readme.read_text(encoding="utf-8")[:5000], flags=re.MULTILINE)
    return found.group(1) if found else None


def _shown(path: str) -> str:
    """A hub id as it is; of a local path the name, for where it lies is nobody's business."""
    return Path(path).name if Path(path).exists() or path.startswith((".", "/", "~")) else path


def _scores(run: LoadedRun) -> list[str]:
    """What `remix eval` has measured of the routed model."""
    file = run.folder.evaluations / f"{run.which}.json"
    if not file.is_file():
        return []
    rows = [
        "## Scores of the routed model",
        "",
        "| task | score | value | 95 % interval | rows | protocol |",
        "|---|---|---|---|---|---|",
    ]
    for result in read_report(file).results:
        asked = result.protocol.asked
        how = f"{asked.decoding}, {asked.shots} shots, data {asked.data[:8]}, prompts {asked.prompts[:8]}"
        for name, score in result.scores.items():
            interval = f"{score.low:.4f} to {score.high:.4f}"
            rows.append(f"| {result.task} | {name} | {score.value:.4f} | {interval} | {result.count} | {how} |")
    return ["\n".join(rows)]


def _routing(run: LoadedRun) -> list[str]:
    """The last routing figures that training logged."""
    try:
        lines = [json.loads(x) for x in run.folder.metrics.read_text(encoding="utf-8").splitlines()]
        last = [line for line in lines if "router_entropy" in line][-1]
        return [
            f"## Routing\n\nAt step {last['step']}: entropy of q {last['router_entropy']:.2f} nats, effective support "
            f"of the weights {last['ess_weights']:.2f}, LoRAs that serve under 1 % of the tokens: {last['dead_loras']}."
        ]
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return []
