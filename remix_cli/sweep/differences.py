"""How far the arms of a sweep are apart, score by score, and what that says in words."""

import re
from dataclasses import dataclass, replace

import numpy as np

from remix_cli.evaluation.evaluated import Evaluated, comparable_measures, scores_in_common
from remix_cli.evaluation.report import TaskResult
from remix_cli.evaluation.score_tables import number
from remix_cli.evaluation.statistics import (
    Score,
    SeedDifference,
    Spread,
    difference_over_seeds,
    score_over_seeds,
)


@dataclass(frozen=True)
class ArmDifference:
    """How far one arm is from another by one score."""

    found: SeedDifference
    lower_is_better: bool

    @property
    def is_clear(self) -> bool:
        return self.found.is_clear

    def in_words(self) -> str:
        """`better by 0.0120 (0.0060 to 0.0180)`, or that nothing is clear and what would settle it."""
        score, seeds = self.found.score, self.found.seeds
        size = _shown(abs(score.value), score)
        if not self.is_clear:
            interval = f"{number(score.low, score.share, sign=True)} to {number(score.high, score.share, sign=True)}"
            return f"no clear difference{self._what_would_settle(size)} ({interval})"
        is_better = (score.value < 0) == self.lower_is_better
        least, most = sorted([abs(score.low), abs(score.high)])
        interval = f"{number(least, score.share)} to {number(most, score.share)}"
        about = "" if seeds > 1 else ", under one seed"
        return f"{'better' if is_better else 'worse'} by {size} ({interval}{about})"

    def _what_would_settle(self, size: str) -> str:
        if self.found.seeds < 2:
            return " under one seed; more seeds would say what training varies by"
        seeds = self.found.seeds_to_settle()
        if seeds is not None:
            return f"; about {seeds} seeds would settle {size}"
        rows = self.found.items_to_settle()
        return f"; about {rows:,} scored rows would settle {size}, more seeds would not" if rows is not None else ""


def _shown(value: float, score: Score) -> str:
    return number(value, score.share) + (" points" if score.share else "")


class ArmsRuns:
    """The finished runs of every arm at its best setting."""

    def __init__(self, runs_of: dict[str, list[Evaluated]]):
        self.runs_of = runs_of
        self.skipped: dict[str, str] = {}  # by task that not all runs were asked alike, why

    def scores(self, arm: str) -> dict[str, Score]:
        """`<task> <score>` -> its mean over the arm's runs."""
        runs = self.runs_of[arm]
        found = {}
        for first in runs[0].report.results:
            task = first.task
            results = [run.result(task) for run in runs]
            why = _why_not([first], results)
            if why:
                self.skipped.setdefault(task, why)
                continue
            for score in scores_in_common(_present(results)):
                parts = np.stack([run.parts(task, score) for run in runs])  # (seeds, 2, S)
                spread = Spread.within(list(self._values(task, score, first).values()))
                found[f"{task} {score}"] = score_over_seeds(parts, first.scores[score].share, spread)
        return found

    def differences(self, arm: str, other: str) -> dict[str, ArmDifference]:
        """`<task> <score>` -> how far `arm` is from `other`."""
        found = {}
        for first in self.runs_of[arm][0].report.results:
            task = first.task
            of_other = [run.result(task) for run in self.runs_of[other]]
            of_arm = [run.result(task) for run in self.runs_of[arm]]
            why = _why_not(of_other, of_arm)
            if why:
                self.skipped.setdefault(task, why)
                continue
            for score in scores_in_common([first, *_present(of_other), *_present(of_arm)]):
                found[f"{task} {score}"] = self._difference(arm, other, first, score)
        return found

    def _difference(self, arm: str, other: str, first: TaskResult, score: str) -> ArmDifference:
        """By the seeds that both have, if these are two or more; what seeds vary by comes from all that have them.

        An arm that is not trained is the same under every seed of the other, which alone varies.
        """
        task = first.task
        ours, theirs = self.runs_of[arm], self.runs_of[other]
        shared = _shared_seeds(ours, theirs)
        values = self._values(task, score, first)
        spread = Spread.within(list(values.values()))
        if _is_trained(ours) != _is_trained(theirs):
            runs = max(len(ours), len(theirs))
            ours, theirs = (some if _is_trained(some) else some[:1] * runs for some in (ours, theirs))
            spread = spread and replace(spread, variance=spread.variance / 2)  # it is counted for both arms
        elif len(shared) > 1:
            ours, theirs = _of_seeds(ours, shared), _of_seeds(theirs, shared)
            alike = [name for name in values if len(_of_seeds(self.runs_of[name], shared)) == len(shared)]
            spread = Spread.paired(np.stack([_scores(_of_seeds(self.runs_of[n], shared), task, score) for n in alike]))
        one = np.stack([run.parts(task, score) for run in theirs])  # (seeds, 2, S)
        two = np.stack([run.parts(task, score) for run in ours])
        found = difference_over_seeds(one, two, first.scores[score].share, spread)
        return ArmDifference(found, comparable_measures(first)[score].lower_is_better)

    def _values(self, task: str, score: str, first: TaskResult) -> dict[str, np.ndarray]:
        """Of each arm that was asked what `first` was, its runs' scores (seeds,)."""
        found = {}
        for name, runs in self.runs_of.items():
            results = [run.result(task) for run in runs]
            if not _why_not([first], results) and all(score in result.scores for result in _present(results)):
                found[name] = _scores(runs, task, score)
        return found


def _is_trained(runs: list[Evaluated]) -> bool:
    return runs[0].costs.trained_parameters != 0


def _scores(runs: list[Evaluated], task: str, score: str) -> np.ndarray:
    return np.array([result.scores[score].value for result in _present([run.result(task) for run in runs])])


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


def _shared_seeds(some: list[Evaluated], others: list[Evaluated]) -> list[int]:
    known = {_seed(run) for run in others}
    return [seed for seed in map(_seed, some) if seed is not None and seed in known]


def _of_seeds(runs: list[Evaluated], seeds: list[int]) -> list[Evaluated]:
    """In the order of `seeds`; those that there are."""
    by_seed = {_seed(run): run for run in runs}
    return [by_seed[seed] for seed in seeds if seed in by_seed]


def _seed(run: Evaluated) -> int | None:
    """From the run folder's name, which the sweep gave it."""
    found = re.search(r"seed(\d+)$", run.run.path.name)
    return int(found[1]) if found else None
