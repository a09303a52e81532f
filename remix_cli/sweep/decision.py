"""Which arm of a sweep to take. One score decides: that of the sweep's metric where it was scored, else the first."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from remix_cli.evaluation.evaluated import Evaluated, comparable_measures
from remix_cli.evaluation.statistics import Score
from remix_cli.stored_json import Document, read_fields
from remix_cli.sweep.differences import ArmsRuns


@dataclass(frozen=True)
class Decision:
    """`take` is the first arm, as the sweep's file orders them, that nothing separates from the best."""

    score: str  # that decides: `nll loss`
    best: str  # the arm whose mean is best
    take: str
    level: list[str]  # arms that nothing separates from the best, itself among them
    against: dict[str, str] = field(default_factory=dict)  # every other arm's difference from the best, in words

    def to_dict(self) -> Document:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, document: Any) -> "Decision":
        return read_fields(cls, document)


def decide(metric: str, scores_of: dict[str, dict[str, Score]], runs: ArmsRuns) -> Decision | None:
    """`scores_of`: each arm's means by `<task> <score>`. None if no score is common to all arms."""
    names = _of_all(list(scores_of.values()))
    some_run = next(iter(runs.runs_of.values()))[0]
    lower_is_better = _directions(some_run)
    score = _deciding(metric, [name for name in names if name in lower_is_better], some_run)
    if score is None:
        return None
    sign = 1 if lower_is_better[score] else -1
    best = min(scores_of, key=lambda arm: sign * scores_of[arm][score].value)
    level = []
    against = {}
    for arm in scores_of:
        difference = None if arm == best else runs.differences(arm, best).get(score)
        if difference is not None:
            against[arm] = difference.in_words()
        if arm == best or (difference is not None and not difference.is_clear):
            level.append(arm)
    return Decision(score, best, level[0], level, against)


def _of_all(of_arms: Sequence[dict[str, Score]]) -> list[str]:
    return [name for name in of_arms[0] if all(name in of_arm for of_arm in of_arms)]


def _directions(run: Evaluated) -> dict[str, bool]:
    """`<task> <score>` -> is less better?"""
    found = {}
    for result in run.report.results:
        for score, measure in comparable_measures(result).items():
            found[f"{result.task} {score}"] = measure.lower_is_better
    return found


def _deciding(metric: str, names: list[str], run: Evaluated) -> str | None:
    wanted = metric.replace("/", " ", 1)
    if wanted in names:
        return wanted
    losses = [f"{result.task} loss" for result in run.report.results if result.protocol.asked.task == "nll"]
    if metric == "eval_loss":
        names = [name for name in names if name in losses] + names
    return names[0] if names else None
