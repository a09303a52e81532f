"""From a sweep's folder to the paper's Table 1 in shape: one row for each arm, over seeds.

What is compared: each arm at its best setting with the first arm that has finished runs, score by score. Paired how:
by seed where all arms have the same two seeds or more, and always by item, since all runs were asked the same. With
which interval: 95 %, over what items and seeds vary by (`score_over_seeds`, `difference_over_seeds`); what seeds vary
by is learnt from all arms together. What follows from it: decision.py.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from remix_cli.errors import ArtefactError, RemixError
from remix_cli.evaluation.evaluated import Evaluated, load_evaluated
from remix_cli.evaluation.statistics import Score
from remix_cli.folders import holds_runs
from remix_cli.recipe import load_recipe
from remix_cli.recipe.sweep_grammar import Setting, describe
from remix_cli.stored_json import Document, check_kinds, read_fields
from remix_cli.sweep.decision import Decision, decide
from remix_cli.sweep.differences import ArmsRuns
from remix_cli.sweep.record import FILE, ArmRecord, SearchedPoint, SweepRecord, read_record


@dataclass(frozen=True)
class ArmReport:
    """One arm at its best setting. Means over its runs, which differ in the seed only."""

    arm: str
    setting: str
    runs: int
    trained_parameters: int
    active_parameters: int
    train_seconds: float  # by the clock, of the run that took least: others may have shared the machine
    train_tokens: float
    peak_memory_gib: float
    validation: float | None  # the sweep's metric at the end of each run, its mean over `validation_runs` of them
    edges: list[str]  # settings whose best value is the smallest or largest that was tried
    held_out_rows: int | None  # that the setting was chosen by
    scores: dict[str, Score]  # `<task> <score>` -> over seeds
    differences: dict[str, Score]  # from the first arm, over seeds and items, paired by seed where both have them
    verdicts: dict[str, str]  # what each difference says, in words
    beyond: dict[str, float] = field(default_factory=dict)  # keys at an edge, each with a value to try past it
    validation_runs: int = 1  # earlier reports have the first seed's value

    def to_dict(self) -> Document:
        document = asdict(self)
        if not self.beyond:
            del document["beyond"]
        if self.validation_runs == 1:
            del document["validation_runs"]
        for score in document["scores"].values():
            if not math.isfinite(score["low"]):  # as single runs once had it; JSON has no infinity
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
    decision: Decision | None = None  # None where no score is common to all; the first reports lack it
    rows: dict[str, str] = field(default_factory=dict)  # what each task's rows are called, likewise
    base: float | None = None  # the metric of the base model, as a run measured it before its first step, likewise

    def to_dict(self) -> Document:
        document: Document = {
            "metric": self.metric,
            "seeds": self.seeds,
            "reference": self.reference,
            "arms": [arm.to_dict() for arm in self.arms],
            "skipped": self.skipped,
        }
        if self.decision is not None:
            document["decision"] = self.decision.to_dict()
        if self.rows:
            document["rows"] = self.rows
        if self.base is not None:
            document["base"] = self.base
        return document

    @classmethod
    def from_dict(cls, document: Any) -> "SweepReport":
        found = dict(check_kinds(document, {"arms": list}))
        found["arms"] = [ArmReport.from_dict(arm) for arm in found["arms"]]
        if "decision" in found:
            found["decision"] = Decision.from_dict(found["decision"])
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
        said = "see the logs beside the run folders" if record.left is None else "the same `remix sweep` goes on"
        raise ArtefactError(f"{folder}: no arm of this sweep has a run that is trained and scored; {said}")
    reference = next(iter(runs_of))
    runs = ArmsRuns(runs_of)
    arms = [_arm_report(name, record, runs, reference) for name in runs_of]
    decision = decide(record.metric, {arm.arm: arm.scores for arm in arms}, runs)
    skipped = [f"{name}: no finished run" for name in record.arms if name not in runs_of]
    if record.left is not None:
        skipped.append(f"stopped with {record.left} still to do; the same `remix sweep` goes on")
    if runs.skipped:
        skipped.append("; ".join(f"{task}: {why}" for task, why in runs.skipped.items()))
    rows = {result.task: result.rows for result in runs_of[reference][0].report.results if result.rows is not None}
    base = _base_value(record.metric, [run for some in runs_of.values() for run in some])
    return SweepReport(record.metric, record.seeds, reference, arms, skipped, decision, rows, base)


def _arm_report(name: str, record: SweepRecord, arms: ArmsRuns, reference: str) -> ArmReport:
    arm = record.arms[name]
    runs = arms.runs_of[name]
    held_out = [value for run in runs if (value := _measured(run, record.metric, last=True)) is not None]
    first = _value_of_chosen(arm)
    differences = {} if name == reference else arms.differences(name, reference)
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
        train_seconds=min((cost.seconds for cost in costs if cost.seconds), default=0.0),
        train_tokens=_mean([cost.tokens for cost in costs]),
        peak_memory_gib=_mean([cost.peak_memory_gib for cost in costs]),
        validation=float(np.mean(held_out)) if held_out else first,
        edges=edges(arm.searched, arm.chosen),
        held_out_rows=_held_out_rows(runs[0]),
        scores=arms.scores(name),
        differences={key: difference.found.score for key, difference in differences.items()},
        verdicts={key: difference.in_words() for key, difference in differences.items()},
        beyond=beyond(arm.searched, arm.chosen),
        validation_runs=len(held_out) or 1,
    )


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
    found = _measured(run, "eval_rows")
    return None if found is None else int(found)


def _measured(run: Evaluated, metric: str, last: bool = False) -> float | None:
    """What the run's metrics say of `metric`, first or last; None if nothing, for no report fails for want of it."""
    try:
        lines = run.run.metrics.read_text(encoding="utf-8").splitlines()
        values = [record[metric] for record in map(json.loads, lines) if metric in record]
        return float(values[-1 if last else 0]) if values else None
    except (OSError, ValueError, TypeError):
        return None


def _base_value(metric: str, runs: list[Evaluated]) -> float | None:
    """The base model's: measured at step 0, by a run whose adapter then changed nothing. None if no run can tell."""
    for run in runs:
        try:
            recipe = load_recipe(run.run.recipe, stored=True)
            begun = json.loads(run.run.metrics.read_text(encoding="utf-8").partition("\n")[0])
        except (OSError, ValueError, TypeError, RemixError):
            continue
        is_ours = recipe.adapter_config().pool is not None  # B of every LoRA begins at zero
        if is_ours and recipe.adapter.init_from is None and begun.get("step") == 0 and metric in begun:
            return float(begun[metric])
    return None


def edges(searched: list[SearchedPoint], chosen: Setting | None) -> list[str]:
    """Settings of the best point that lie at the end of what was tried, so that the best may lie beyond."""
    return [describe({key: (chosen or {})[key]}) for key in beyond(searched, chosen)]


def beyond(searched: list[SearchedPoint], chosen: Setting | None) -> dict[str, float]:
    """Those settings by key, each with a value to try: as far off as the neighbour on the other side, as factors go.

    Where the next value diverged, what lies in the middle.
    """
    found: dict[str, float] = {}
    for key, value in (chosen or {}).items():
        tried = _numbers(searched, key)
        good = _numbers([point for point in searched if point.value is not None], key)
        if len(good) < 2 or value not in (good[0], good[-1]):
            continue
        is_largest = value == good[-1]
        near = good[-2] if is_largest else good[1]
        past = [one for one in tried if (one > value if is_largest else one < value)]
        if value <= 0 or near <= 0:  # factors make no sense
            next_one = 2 * value - near
        elif past:
            next_one = math.sqrt(value * (past[0] if is_largest else past[-1]))
        else:
            next_one = value * value / near
        found[key] = round(next_one) if isinstance(value, int) else float(f"{next_one:.3g}")
    return found


def _numbers(points: list[SearchedPoint], key: str) -> list[float]:
    """What the points have at `key`, ascending, each once."""
    values = [point.setting.get(key) for point in points]
    return sorted({one for one in values if isinstance(one, int | float) and not isinstance(one, bool)})
