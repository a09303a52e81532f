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

from remix_cli.errors import ArtefactError
from remix_cli.evaluation.evaluated import Evaluated, load_evaluated
from remix_cli.evaluation.statistics import Score
from remix_cli.folders import holds_runs
from remix_cli.recipe.sweep_grammar import Setting, describe
from remix_cli.stored_json import Document, check_kinds, read_fields
from remix_cli.sweep.decision import Decision, decide
from remix_cli.sweep.differences import ArmsRuns
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
    beyond: dict[str, float] = field(default_factory=dict)  # keys at an edge, each with a value to try past it

    def to_dict(self) -> Document:
        document = asdict(self)
        if not self.beyond:
            del document["beyond"]
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
        raise ArtefactError(f"{folder}: no arm of this sweep has a finished run; see the logs beside the run folders")
    reference = next(iter(runs_of))
    runs = ArmsRuns(runs_of)
    arms = [_arm_report(name, record.arms[name], runs, reference) for name in runs_of]
    decision = decide(record.metric, {arm.arm: arm.scores for arm in arms}, runs)
    skipped = [f"{name}: no finished run" for name in record.arms if name not in runs_of]
    skipped += list(dict.fromkeys(runs.skipped))
    rows = {result.task: result.rows for result in runs_of[reference][0].report.results if result.rows is not None}
    return SweepReport(record.metric, record.seeds, reference, arms, skipped, decision, rows)


def _arm_report(name: str, arm: ArmRecord, arms: ArmsRuns, reference: str) -> ArmReport:
    runs = arms.runs_of[name]
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
        train_seconds=_mean([cost.seconds for cost in costs]),
        train_tokens=_mean([cost.tokens for cost in costs]),
        peak_memory_gib=_mean([cost.peak_memory_gib for cost in costs]),
        validation=_value_of_chosen(arm),
        edges=edges(arm.searched, arm.chosen),
        held_out_rows=_held_out_rows(runs[0]),
        scores=arms.scores(name),
        differences={key: difference.found.score for key, difference in differences.items()},
        verdicts={key: difference.in_words() for key, difference in differences.items()},
        beyond=beyond(arm.searched, arm.chosen),
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
