"""From a sweep's folder to the paper's Table 1 in shape: one row for each arm, over seeds."""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remix_cli.errors import ArtefactError
from remix_cli.evaluation.compare import Evaluated, difference_of_protocols, load_evaluated, parts_of, scores_in_common
from remix_cli.evaluation.score_tables import number
from remix_cli.evaluation.statistics import Score, difference_over_seeds, over_seeds, seeds_to_settle
from remix_cli.folders import RunFolder, holds_runs, read_sweep
from remix_cli.recipe.sweep_grammar import describe
from remix_cli.sweep.runner import FILE


@dataclass
class ArmReport:
    """One arm at its best setting. Means over its runs, which differ in the seed only."""

    arm: str
    setting: str
    runs: int
    trained_parameters: int
    active_parameters: int
    train_seconds: float
    train_tokens: float
    peak_memory_gib: float
    validation: float | None  # of the chosen setting, under the first seed
    edges: list[str]  # settings whose best value is the smallest or largest that was tried
    held_out_rows: int | None  # that the setting was chosen by
    scores: dict[str, Score]  # `<task> <score>` -> over seeds
    differences: dict[str, Score]  # from the first arm, over seeds and items, paired by seed where both have them
    verdicts: dict[str, str]  # what each difference says, in words


def is_sweep(path: Path) -> bool:
    return (path / FILE).is_file() or holds_runs(path)


def sweep_report(folder: Path) -> dict[str, Any]:
    """{metric, seeds, reference, arms: [...], skipped: [...]}. Raises ArtefactError."""
    if not (folder / FILE).is_file():
        raise ArtefactError(f"{folder}: this sweep has not come to its end; the `remix sweep` that began it goes on")
    document = read_sweep(folder / FILE)
    arms = {name: arm for name, arm in document["arms"].items() if arm["reports"]}
    found = {name: [load_evaluated(folder / run) for run in arm["reports"]] for name, arm in arms.items()}
    if not found:
        raise ArtefactError(f"{folder}: no arm of this sweep has a finished run; see the logs beside the run folders")
    reference = next(iter(found))
    skipped: list[str] = []
    rows = [
        _without_infinities(
            asdict(_arm(name, arms[name], runs, found[reference] if name != reference else None, skipped))
        )
        for name, runs in found.items()
    ]
    absent = [f"{name}: no finished run" for name in document["arms"] if name not in found]
    header = {"metric": document["metric"], "seeds": document["seeds"], "reference": reference}
    return header | {"arms": rows, "skipped": absent + list(dict.fromkeys(skipped))}


def _arm(
    name: str, arm: dict[str, Any], runs: list[Evaluated], reference: list[Evaluated] | None, skipped: list[str]
) -> ArmReport:
    summaries = [run.summary for run in runs]

    def mean(key: str) -> float:
        return float(np.mean([summary.get(key, 0.0) for summary in summaries]))

    parameters = summaries[0]["parameters"]
    value = next((s["value"] for s in arm["searched"] if s["setting"] == arm["chosen"]), None)
    results = [{r["task"]: r for r in run.report["results"]} for run in runs]
    scores: dict[str, Score] = {}
    differences: dict[str, Score] = {}
    for task, first in results[0].items():
        why = next((why for found in results if (why := _why(first, found.get(task)))), "")
        if why:
            skipped.append(f"{task}: the runs of {name} were not asked the same ({why}); no mean")
            continue
        for score in scores_in_common([found[task] for found in results if task in found]):
            values = [found[task]["scores"][score] for found in results if task in found]
            scores[f"{task} {score}"] = over_seeds(values, score in first["shares"])
    shared = _shared_seeds(reference or [], runs)
    verdicts: dict[str, str] = {}
    for task, result in results[0].items() if reference else ():
        others = [next((r for r in run.report["results"] if r["task"] == task), None) for run in reference or []]
        mine = [found.get(task) for found in results]
        why = next((_why(other, one) for other in others for one in mine if _why(other, one)), "")
        if why:
            skipped.append(f"{task}: {name} was not asked what the first arm was ({why}); no difference")
            continue
        for score in scores_in_common([result, *(r for r in [*others, *mine] if r)]):
            groups = shared or (reference or [], runs)
            one, two = (np.stack([parts_of(run, task, score) for run in group]) for group in groups)
            found_difference = difference_over_seeds(one, two, score in result["shares"], paired=bool(shared))
            differences[f"{task} {score}"] = found_difference
            verdicts[f"{task} {score}"] = verdict(found_difference, score, len(two), bool(shared))
    return ArmReport(
        name,
        describe(arm["chosen"] or {}),
        len(runs),
        parameters["trained"],
        parameters["active"],
        mean("seconds"),
        mean("tokens"),
        mean("peak_memory_gib"),
        value,
        edges(arm["searched"], arm["chosen"]),
        _held_out_rows(runs[0]),
        scores,
        differences,
        verdicts,
    )


def _shared_seeds(reference: list[Evaluated], runs: list[Evaluated]) -> tuple[list[Evaluated], list[Evaluated]] | None:
    """The runs of both arms that have their seed in common, in the same order; None if that is fewer than two."""
    by_seed = [{_seed(run): run for run in group} for group in (reference, runs)]
    seeds = [seed for seed in by_seed[0] if seed is not None and seed in by_seed[1]]
    if len(seeds) < 2:
        return None
    return [by_seed[0][seed] for seed in seeds], [by_seed[1][seed] for seed in seeds]


def _seed(run: Evaluated) -> int | None:
    """From the run folder's name, which the sweep gave it."""
    found = re.search(r"seed(\d+)$", run.folder.parent.name)
    return int(found[1]) if found else None


def _held_out_rows(run: Evaluated) -> int | None:
    """What the run's metrics say; runs of earlier versions do not."""
    try:
        lines = RunFolder(run.folder.parent).metrics.read_text(encoding="utf-8").splitlines()
        return next((int(m["eval_rows"]) for m in map(json.loads, lines) if "eval_rows" in m), None)
    except (OSError, ValueError, TypeError):
        return None


def edges(searched: list[dict[str, Any]], chosen: dict[str, Any] | None) -> list[str]:
    """Settings of the best point that lie at the end of what was tried, so that the best may lie beyond."""
    found = []
    for key, value in (chosen or {}).items():
        tried = [point["setting"].get(key) for point in searched if point["value"] is not None]
        numbers = [v for v in tried if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(set(numbers)) > 1 and value in (min(numbers), max(numbers)):
            found.append(describe({key: value}))
    return found


def verdict(difference: Score, score: str, seeds: int, paired: bool) -> str:
    """`better by 0.0120 (0.0060 to 0.0180)`, or that nothing is clear and what would settle it."""
    low_is_better = score in ("loss", "perplexity") or score.startswith("loss/")
    size, unit = abs(difference.value), " points" if difference.share else ""
    ends = sorted(abs(end) for end in (difference.low, difference.high))
    if difference.low <= 0 <= difference.high:
        if seeds < 2:
            return "no clear difference under one seed; sweep.seeds: [0, 1, 2] or more says what training varies by"
        more = seeds_to_settle(difference, seeds) if paired else None
        settle = f"; about {more} seeds would settle {number(size, difference.share)}{unit}" if more else ""
        return f"no clear difference{settle}"
    word = "better" if (difference.value < 0) == low_is_better else "worse"
    interval = " to ".join(number(end, difference.share) for end in ends)
    about = "" if seeds > 1 else ", under one seed"
    return f"{word} by {number(size, difference.share)}{unit} ({interval}{about})"


def _why(one: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """Why two runs' results of a task do not compare; empty if they do."""
    if one is None or other is None:
        return "not scored in every run"
    return difference_of_protocols(one, other)


def _without_infinities(arm: dict[str, Any]) -> dict[str, Any]:
    """JSON has none: a score of a single run has no interval over seeds."""
    for score in arm["scores"].values():
        if not math.isfinite(score["low"]):
            score["low"] = score["high"] = None
    return arm
