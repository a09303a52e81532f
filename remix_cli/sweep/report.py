"""From a sweep's folder to the paper's Table 1 in shape: one row for each arm, over seeds.

What is compared: each arm at its best setting with the first arm that has finished runs, score by score. Paired how:
by seed where both arms have two seeds or more in common, and always by item, since all runs were asked the same. With
which interval: 95 %, of the mean over seeds by Student's t (`over_seeds`), of the difference by Student's t over what
seeds and items vary by (`difference_over_seeds`).
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remix_cli.errors import ArtefactError
from remix_cli.evaluation.evaluated import Evaluated, comparable_measures, load_evaluated, scores_in_common
from remix_cli.evaluation.report import TaskResult
from remix_cli.evaluation.score_tables import number
from remix_cli.evaluation.statistics import Score, difference_over_seeds, over_seeds, seeds_to_settle
from remix_cli.folders import holds_runs
from remix_cli.recipe.sweep_grammar import Setting, describe
from remix_cli.stored_json import Document, check_kinds, read_fields
from remix_cli.sweep.record import FILE, ArmRecord, SearchedPoint, read_record


@dataclass(frozen=True)
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

    def to_dict(self) -> Document:
        document = asdict(self)
        for score in document["scores"].values():
            if not math.isfinite(score["low"]):  # of a single run; JSON has no infinity
                score["low"] = score["high"] = None
        return document

    @classmethod
    def from_dict(cls, document: Any) -> "ArmReport":
        found = dict(check_kinds(document, {"scores": dict, "differences": dict}))
        for key in ("scores", "differences"):
            found[key] = {name: _read_score(score) for name, score in found[key].items()}
        return read_fields(cls, found)


@dataclass(frozen=True)
class SweepReport:
    """What `remix sweep --json`, and `remix compare --json` of a sweep's folder, print."""

    metric: str
    seeds: list[int]
    reference: str  # the arm that others are compared with
    arms: list[ArmReport]
    skipped: list[str]  # what is not in the rows, and why

    def to_dict(self) -> Document:
        return {
            "metric": self.metric,
            "seeds": self.seeds,
            "reference": self.reference,
            "arms": [arm.to_dict() for arm in self.arms],
            "skipped": self.skipped,
        }

    @classmethod
    def from_dict(cls, document: Any) -> "SweepReport":
        found = dict(check_kinds(document, {"arms": list}))
        found["arms"] = [ArmReport.from_dict(arm) for arm in found["arms"]]
        return read_fields(cls, found)


def _read_score(document: Any) -> Score:
    found = check_kinds(document, {"low": int | float | None, "high": int | float | None})
    if found["low"] is None:
        found = found | {"low": -math.inf, "high": math.inf}
    return read_fields(Score, found)


def is_sweep(path: Path) -> bool:
    return (path / FILE).is_file() or holds_runs(path)


def sweep_report(folder: Path) -> SweepReport:
    """One row for each arm that has finished runs. Raises ArtefactError if none has."""
    if not (folder / FILE).is_file():
        raise ArtefactError(f"{folder}: this sweep has not come to its end; the `remix sweep` that began it goes on")
    record = read_record(folder / FILE)
    runs_of = {}
    for name, arm in record.arms.items():
        if arm.reports:
            runs_of[name] = [load_evaluated(folder / report) for report in arm.reports]
    if not runs_of:
        raise ArtefactError(f"{folder}: no arm of this sweep has a finished run; see the logs beside the run folders")
    reference = next(iter(runs_of))
    skipped = [f"{name}: no finished run" for name in record.arms if name not in runs_of]
    arms = []
    for name, runs in runs_of.items():
        others = [] if name == reference else runs_of[reference]
        arms.append(_arm_report(name, record.arms[name], runs, others, skipped))
    return SweepReport(record.metric, record.seeds, reference, arms, list(dict.fromkeys(skipped)))


def _arm_report(
    name: str, arm: ArmRecord, runs: list[Evaluated], reference: list[Evaluated], skipped: list[str]
) -> ArmReport:
    """`reference`: the runs of the first arm, none if this is it. A line for each task left out goes to `skipped`."""
    scores = _scores_over_seeds(name, runs, skipped)
    differences: dict[str, Score] = {}
    verdicts: dict[str, str] = {}
    if reference:
        differences, verdicts = differences_from(name, runs, reference, skipped)
    costs = [run.costs for run in runs]
    trained, active = costs[0].trained_parameters, costs[0].active_parameters
    if trained is None or active is None:
        raise ArtefactError(f"{runs[0].run.summary}: does not say how many parameters were trained; resume the run")
    return ArmReport(
        arm=name,
        setting=describe(arm.chosen or {}),
        runs=len(runs),
        trained_parameters=trained,
        active_parameters=active,
        train_seconds=_mean([cost.seconds for cost in costs]),
        train_tokens=_mean([cost.tokens for cost in costs]),
        peak_memory_gib=_mean([cost.peak_memory_gib for cost in costs]),
        validation=_value_of_chosen(arm),
        edges=edges(arm.searched, arm.chosen),
        held_out_rows=_held_out_rows(runs[0]),
        scores=scores,
        differences=differences,
        verdicts=verdicts,
    )


def _scores_over_seeds(name: str, runs: list[Evaluated], skipped: list[str]) -> dict[str, Score]:
    """`<task> <score>` -> its mean over the arm's runs."""
    scores = {}
    for first in runs[0].report.results:
        task = first.task
        results = [run.result(task) for run in runs]
        why = _why_not([first], results)
        if why:
            skipped.append(f"{task}: the runs of {name} were not asked the same ({why}); no mean")
            continue
        present = _present(results)
        for score in scores_in_common(present):
            values = [result.scores[score].value for result in present]
            scores[f"{task} {score}"] = over_seeds(values, first.scores[score].share)
    return scores


def differences_from(
    name: str, runs: list[Evaluated], reference: list[Evaluated], skipped: list[str]
) -> tuple[dict[str, Score], dict[str, str]]:
    """`<task> <score>` -> how far the arm's runs are from the reference's, and the same in words.

    A line for each task that they were not asked alike goes to `skipped`.
    """
    paired = _with_shared_seeds(reference, runs)
    is_paired = len(paired) > 1
    ours, theirs = runs, reference
    if is_paired:
        theirs, ours = [pair[0] for pair in paired], [pair[1] for pair in paired]
    differences = {}
    verdicts = {}
    for first in runs[0].report.results:
        task = first.task
        of_reference = [run.result(task) for run in reference]
        of_runs = [run.result(task) for run in runs]
        why = _why_not(of_reference, of_runs)
        if why:
            skipped.append(f"{task}: {name} was not asked what the first arm was ({why}); no difference")
            continue
        for score in scores_in_common([first, *_present(of_reference), *_present(of_runs)]):
            one = np.stack([run.parts(task, score) for run in theirs])  # (seeds, 2, S)
            two = np.stack([run.parts(task, score) for run in ours])
            difference = difference_over_seeds(one, two, first.scores[score].share, paired=is_paired)
            low_is_better = comparable_measures(first)[score].lower_is_better
            differences[f"{task} {score}"] = difference
            verdicts[f"{task} {score}"] = verdict(difference, low_is_better, len(two), is_paired)
    return differences, verdicts


def _why_not(some: list[TaskResult | None], others: list[TaskResult | None]) -> str:
    """Why results of a task do not compare, each of `some` with each of `others`; empty if all do."""
    for one in some:
        for other in others:
            if one is None or other is None:
                return "not scored in every run"
            different = one.protocol.asked.differences(other.protocol.asked)
            if different:
                return different
    return ""


def _present(results: list[TaskResult | None]) -> list[TaskResult]:
    return [result for result in results if result is not None]


def _with_shared_seeds(reference: list[Evaluated], runs: list[Evaluated]) -> list[tuple[Evaluated, Evaluated]]:
    """The runs of both arms that have their seed in common, seed by seed."""
    by_seed = {_seed(run): run for run in runs}
    pairs = []
    for run in reference:
        seed = _seed(run)
        if seed is not None and seed in by_seed:
            pairs.append((run, by_seed[seed]))
    return pairs


def _seed(run: Evaluated) -> int | None:
    """From the run folder's name, which the sweep gave it."""
    found = re.search(r"seed(\d+)$", run.run.path.name)
    return int(found[1]) if found else None


def _mean(values: list[float | None] | list[int | None]) -> float:
    """What a run does not say counts as 0."""
    return float(np.mean([value or 0.0 for value in values]))


def _value_of_chosen(arm: ArmRecord) -> float | None:
    for point in arm.searched:
        if point.setting == arm.chosen:
            return point.value
    return None


def _held_out_rows(run: Evaluated) -> int | None:
    """What the run's metrics say; runs of earlier versions do not."""
    try:
        for line in run.run.metrics.read_text(encoding="utf-8").splitlines():
            measured = json.loads(line)
            if "eval_rows" in measured:
                return int(measured["eval_rows"])
    except (OSError, ValueError, TypeError):  # the count is a courtesy: no report fails for want of it
        return None
    return None


def edges(searched: list[SearchedPoint], chosen: Setting | None) -> list[str]:
    """Settings of the best point that lie at the end of what was tried, so that the best may lie beyond."""
    found = []
    for key, value in (chosen or {}).items():
        tried = [point.setting.get(key) for point in searched if point.value is not None]
        numbers = [one for one in tried if isinstance(one, int | float) and not isinstance(one, bool)]
        if len(set(numbers)) > 1 and value in (min(numbers), max(numbers)):
            found.append(describe({key: value}))
    return found


def verdict(difference: Score, low_is_better: bool, seeds: int, paired: bool) -> str:
    """`better by 0.0120 (0.0060 to 0.0180)`, or that nothing is clear and what would settle it."""
    unit = " points" if difference.share else ""
    size = number(abs(difference.value), difference.share) + unit
    if difference.low <= 0 <= difference.high:
        if seeds < 2:
            return "no clear difference under one seed; sweep.seeds: [0, 1, 2] or more says what training varies by"
        more = seeds_to_settle(difference, seeds) if paired else None
        if more is None:
            return "no clear difference"
        return f"no clear difference; about {more} seeds would settle {size}"
    is_better = (difference.value < 0) == low_is_better
    least, most = sorted([abs(difference.low), abs(difference.high)])
    interval = f"{number(least, difference.share)} to {number(most, difference.share)}"
    about = "" if seeds > 1 else ", under one seed"
    return f"{'better' if is_better else 'worse'} by {size} ({interval}{about})"
