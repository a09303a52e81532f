"""What lm-evaluation-harness found, as results of our own: a line for each item, scores with intervals, a stamp.

Needs neither the harness nor torch: `remix compare` reads what a stamp declares.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remix_cli.stored_json import Document
from remix_cli.tasks.base import Line, Measure, TaskStamp, digest

if TYPE_CHECKING:
    from remix_cli.evaluation.statistics import Score

PREFIX = "lm-eval-"  # of the names of results, so that its gsm8k does not take the place of ours
# What of a task's settings decides what is asked and how answers are read. Not where the data lie.
DECIDES = (
    "description",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "process_docs",
    "process_results",
    "target_delimiter",
    "fewshot_delimiter",
    "fewshot_split",
    "fewshot_config",
    "filter_list",
    "metric_list",
    "generation_kwargs",
    "repeats",
)


@dataclass(frozen=True)
class Found:
    """One task's part of what `lm_eval.simple_evaluate` returns."""

    name: str
    version: str  # of the task
    config: Document
    shots: int
    aggregates: Document  # `acc,none`, `acc_stderr,none` ...
    higher_is_better: Document
    samples: list[Document]  # one for each item and filter


def found_of(results: Document, name: str) -> Found:
    return Found(
        name,
        str(results["versions"].get(name)),
        results["configs"][name],
        int(results["n-shot"].get(name) or 0),
        results["results"][name],
        results["higher_is_better"].get(name) or {},
        results["samples"][name],
    )


def label_of(name: str) -> str:
    """What the result of the harness's task `name` is called, here and in file names."""
    return PREFIX + re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:80]


def lines_of(found: Found) -> list[Line]:
    """A line for each item, in their order: what it was asked (a hash), what came back, every metric of every filter.

    A metric of the filter `none` goes by its name, others by `metric/filter`. A log-likelihood with its weight (words,
    bytes) becomes nats, for `bits_per_byte` bits, and `<name> weight`. What is neither is left out, as the texts that a
    corpus score is made of.
    """
    by_item: dict[int, Line] = {}
    for sample in found.samples:
        line = by_item.setdefault(sample["doc_id"], _line(sample))
        if sample["filter"] != "none":
            line["filtered"][sample["filter"]] = _plain(sample["filtered_resps"])
        for metric in sample["metrics"]:
            line |= _entries(metric, sample["filter"], sample[metric])
    return [by_item[item] for item in sorted(by_item)]


def _line(sample: Document) -> Line:
    asked = json.dumps(sample["arguments"], sort_keys=True, default=str)
    return {
        "item": sample["doc_id"],
        "prompt": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "output": _plain(sample["resps"]),
        "target": _plain(sample["target"]),
        "filtered": {},
    }


def _entries(metric: str, filter_name: str, value: Any) -> Line:
    """What a line keeps of one metric."""
    name, number = metric_name(metric, filter_name), _number(value)
    if number is not None:
        return {name: number}
    pair = [_number(part) for part in value] if isinstance(value, tuple | list) else []
    if len(pair) != 2 or pair[0] is None or pair[1] is None:
        return {}
    unit = math.log(2) if metric == "bits_per_byte" else 1.0
    return {name: -pair[0] / unit, f"{name} weight": pair[1]}


def metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric}/{filter_name}"


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(value, default=str))


def _number(value: Any) -> float | None:
    of_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0
    if of_numpy or isinstance(value, bool | int | float):
        return float(value)
    return None


def measures_of(found: Found, lines: list[Line]) -> dict[str, Measure]:
    """The metrics whose score is a mean over the items, or all over all weights, of what their lines hold; these can be
    paired. One whose values all lie in [0, 1] is a share.
    """
    measures = {}
    for name, (key, value) in _aggregated(found).items():
        if any(name not in line for line in lines):
            continue
        measure = _measure(name, lines, found.higher_is_better.get(key.partition(",")[0]) is False)
        above, below = _sums(measure, lines)
        if _same(above / below, value):
            measures[name] = measure
    return measures


def _measure(name: str, lines: list[Line], lower_is_better: bool) -> Measure:
    weight = f"{name} weight"
    below = weight if weight in lines[0] else None
    share = below is None and all(0 <= line[name] <= 1 for line in lines)
    return Measure(name, name, below, lower_is_better, share)


def _sums(measure: Measure, lines: list[Line]) -> tuple[float, float]:
    above = sum(line[measure.name] for line in lines)
    below = sum(line[measure.below] for line in lines) if measure.below else float(len(lines))
    return above, below


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


def _aggregated(found: Found) -> dict[str, tuple[str, float]]:
    """The harness's own scores by our names, each with its name there."""
    named = {}
    for key, value in found.aggregates.items():
        metric, comma, filter_name = key.partition(",")
        number = _number(value)
        if comma and number is not None and not metric.endswith("_stderr"):
            named[metric_name(metric, filter_name)] = (key, number)
    return named


def scores_of(found: Found, lines: list[Line], measures: dict[str, Measure]) -> "tuple[dict[str, Score], list[str]]":
    """Scores with 95 % intervals, in the harness's order, and a note for each that has none.

    Means and perplexities have our intervals, as every score here; others 1.96 of the harness's standard errors on both
    sides.
    """
    from remix_cli.evaluation.statistics import Score

    scores: dict[str, Score] = {}
    notes = []
    for name, (key, value) in _aggregated(found).items():
        if name in measures:
            scores[name] = _mean(measures[name], lines)
            continue
        perplexity = _perplexity(name, lines)
        if perplexity is not None and _same(perplexity.value, value):
            scores[name] = perplexity
            continue
        metric, _, filter_name = key.partition(",")
        error = _number(found.aggregates.get(f"{metric}_stderr,{filter_name}"))
        if error is None or math.isnan(error):
            notes.append(f"{found.name}: {name} {value:.4f}, of which lm-eval gives no standard error")
        else:
            scores[name] = Score(value, value - 1.96 * error, value + 1.96 * error, len(lines), False)
    return scores, notes


def _mean(measure: Measure, lines: list[Line]) -> "Score":
    import numpy as np

    from remix_cli.evaluation.statistics import mean, ratio

    above = np.array([line[measure.name] for line in lines])
    if measure.share:
        return mean(above)
    below = np.array([line[measure.below] if measure.below else 1.0 for line in lines])
    return ratio(above, below, share=False)


def _perplexity(name: str, lines: list[Line]) -> "Score | None":
    """exp of all nats over all weights; None where the lines hold no such pairs."""
    from remix_cli.evaluation.statistics import Score

    if any(f"{name} weight" not in line for line in lines):
        return None
    nats = _mean(_measure(name, lines, True), lines)
    return Score(math.exp(nats.value), math.exp(nats.low), math.exp(nats.high), nats.count, False)


def stamp_of(
    found: Found, lines: list[Line], measures: dict[str, Measure], chat_template: str | None, harness: str
) -> TaskStamp:
    """What was asked. `harness`: the version of lm-eval, which forbids no comparison; the task's own version does."""
    config = found.config
    decides = {key: config.get(key) for key in DECIDES}
    template = [json.dumps(decides, sort_keys=True, default=str), str(chat_template)]
    names = [config.get("dataset_path"), config.get("dataset_name")]
    declared = {}
    for name, measure in measures.items():
        declared[name] = {"below": measure.below, "lower_is_better": measure.lower_is_better, "share": measure.share}
    more = {
        "dataset": " ".join(str(name) for name in names if name),
        "lm_eval": harness,
        "measures": declared,
        "aggregates": {key: value for key, value in found.aggregates.items() if _number(value) is not None},
    }
    first_filter = found.samples[0]["filter"]
    data = [sample["doc_hash"] for sample in found.samples if sample["filter"] == first_filter]
    return TaskStamp(
        task=label_of(found.name),
        items=len(lines),
        data=digest(data),
        prompt_template=digest(template),
        prompts=digest([line["prompt"] for line in lines]),
        shots=found.shots,
        chat_template=chat_template is not None,
        decoding=decoding_of(config),
        protocol=f"lm-eval task, version {found.version}",
        more=_plain(more),
    )


def decoding_of(config: Document) -> str:
    if config.get("output_type") != "generate_until":
        return "log-likelihood"
    settings = config.get("generation_kwargs") or {}
    said = ", ".join(f"{key} {settings[key]!r}" for key in sorted(settings))
    return f"generation ({said})"


def declared_measures(stamp: TaskStamp) -> dict[str, Measure]:
    """The measures that the stamp of one of the harness's tasks declares; none of any other's."""
    found = {}
    for name, said in stamp.more.get("measures", {}).items():
        found[name] = Measure(name, name, said["below"], said["lower_is_better"], said["share"])
    return found
