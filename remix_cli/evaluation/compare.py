"""`remix compare`: the same items under several models, item by item.

What is compared: the scores of every task that all reports have and that all were asked in the same way (`TaskStamp`
says what counts). Paired how: line by line, since the files of all hold the same items in the same order. With which
interval: 95 %, by bootstrap over the items, of the difference between the first report's score and another's
(`paired_difference`).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remix_cli.errors import ArtefactError, RecipeError
from remix_cli.evaluation.evaluated import Evaluated, load_evaluated, scores_in_common
from remix_cli.evaluation.report import TaskResult
from remix_cli.evaluation.statistics import paired_difference
from remix_cli.stored_json import Document, check_kinds, read_fields


@dataclass(frozen=True)
class Difference:
    """How far a score is from the first report's, with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ComparedScore:
    """One score of one report, with the ends of its own interval. `share`: a proportion."""

    value: float
    low: float
    high: float
    share: bool
    difference: Difference | None  # None for the first report

    def to_dict(self) -> Document:
        document: Document = {"value": self.value, "interval": [self.low, self.high]}
        if self.difference is not None:
            document["difference"] = self.difference.value
            document["difference_interval"] = [self.difference.low, self.difference.high]
        document["share"] = self.share
        return document

    @classmethod
    def from_dict(cls, document: Any) -> "ComparedScore":
        found = check_kinds(document, {"value": int | float, "interval": list, "share": bool})
        difference = None
        if "difference" in found:
            least, most = found["difference_interval"]
            difference = Difference(found["difference"], least, most)
        low, high = found["interval"]
        return cls(found["value"], low, high, found["share"], difference)


@dataclass(frozen=True)
class ComparedTask:
    """One task: how many items, and for each score one entry per report, in their order."""

    items: int
    scores: dict[str, list[ComparedScore]]
    rows: str | None = None  # what its rows are called, where the first report says so

    def title(self, task: str) -> str:
        return f"{task} ({self.rows})" if self.rows else task

    def to_dict(self) -> Document:
        scores = {}
        for name, entries in self.scores.items():
            scores[name] = [entry.to_dict() for entry in entries]
        document: Document = {"items": self.items, "scores": scores}
        return document | ({"rows": self.rows} if self.rows is not None else {})

    @classmethod
    def from_dict(cls, document: Any) -> "ComparedTask":
        found = check_kinds(document, {"items": int, "scores": dict})
        scores = {}
        for name, entries in found["scores"].items():
            scores[name] = [ComparedScore.from_dict(entry) for entry in entries]
        return cls(found["items"], scores, found.get("rows"))


@dataclass(frozen=True)
class ComparedRun:
    """What a report is of, and what its training cost; None where that is not known, as for a base model."""

    run: str
    method: str | None
    trained_parameters: int | None
    active_parameters: int | None
    train_seconds: float | None
    train_tokens: int | None


@dataclass(frozen=True)
class Comparison:
    """What `remix compare --json` prints."""

    runs: list[ComparedRun]
    tasks: dict[str, ComparedTask]
    skipped: list[str]  # a line for each task that was not asked the same

    def to_dict(self) -> Document:
        return {
            "runs": [asdict(run) for run in self.runs],
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "skipped": self.skipped,
        }

    @classmethod
    def from_dict(cls, document: Any) -> "Comparison":
        found = check_kinds(document, {"runs": list, "tasks": dict, "skipped": list})
        runs = [read_fields(ComparedRun, run) for run in found["runs"]]
        tasks = {name: ComparedTask.from_dict(task) for name, task in found["tasks"].items()}
        return cls(runs, tasks, found["skipped"])


def compare(paths: list[Path]) -> Comparison:
    """Scores of every task that all have, with the paired difference of each from the first.

    A task that two of them were not asked the same is skipped. Raises RecipeError if that leaves none.
    """
    if len(paths) < 2:
        raise RecipeError("compare needs two runs or more")
    runs = [load_evaluated(path) for path in paths]
    for run in runs[1:]:
        run.match(runs[0])
    results = _results_of_all(runs)
    if not results:
        raise RecipeError(f"no task was evaluated in all of them ({_what_each_has(runs)})")
    alike: dict[str, list[TaskResult]] = {}
    skipped = []
    for task, of_runs in results.items():
        problem = _asked_otherwise(task, runs, of_runs)
        if problem:
            skipped.append(problem)
        else:
            alike[task] = of_runs
    if not alike:
        raise RecipeError(*(f"{line}; evaluate both with the same task, data and --limit" for line in skipped))
    tasks = {task: _compare_task(task, runs, of_runs) for task, of_runs in alike.items()}
    return Comparison([_describe(run) for run in runs], tasks, skipped)


def _results_of_all(runs: list[Evaluated]) -> dict[str, list[TaskResult]]:
    """The results of each task that all runs have, one per run; tasks as the first report orders them."""
    found = {}
    for first in runs[0].report.results:
        results = [run.result(first.task) for run in runs]
        present = [result for result in results if result is not None]
        if len(present) == len(runs):
            found[first.task] = present
    return found


def _what_each_has(runs: list[Evaluated]) -> str:
    parts = []
    for run in runs:
        names = ", ".join(result.task for result in run.report.results)
        parts.append(f"{run.label}: {names}")
    return "; ".join(parts)


def _asked_otherwise(task: str, runs: list[Evaluated], results: list[TaskResult]) -> str:
    """A line on the first run that was not asked what the first of all was; empty if all were."""
    first = results[0].protocol.asked
    for run, result in zip(runs[1:], results[1:], strict=True):
        different = first.differences(result.protocol.asked)
        if different:
            return f"{task}: {runs[0].label} and {run.label} were not asked the same ({different})"
    return ""


def _compare_task(task: str, runs: list[Evaluated], results: list[TaskResult]) -> ComparedTask:
    items = runs[0].items(task)
    if any(run.items(task) != items for run in runs):
        raise ArtefactError(f"{task}: the per-example files do not hold the same items; evaluate again")
    scores = {name: _compare_score(task, name, runs, results) for name in scores_in_common(results)}
    return ComparedTask(len(items), scores, results[0].rows)


def _compare_score(task: str, name: str, runs: list[Evaluated], results: list[TaskResult]) -> list[ComparedScore]:
    """One entry per run."""
    reference = runs[0].parts(task, name)
    entries = []
    for run, result in zip(runs, results, strict=True):
        score = result.scores[name]
        difference = None
        if run is not runs[0]:
            found = paired_difference(reference, run.parts(task, name), share=score.share)
            difference = Difference(found.value, found.low, found.high)
        entries.append(ComparedScore(score.value, score.low, score.high, score.share, difference))
    return entries


def _describe(run: Evaluated) -> ComparedRun:
    costs = run.costs
    return ComparedRun(
        run.label,
        costs.method,
        costs.trained_parameters,
        costs.active_parameters,
        costs.seconds,
        costs.tokens,
    )
