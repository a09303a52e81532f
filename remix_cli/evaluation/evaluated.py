"""A finished evaluation read back: its report, the line of every item, and what its run cost to train."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from remix_cli.errors import ArtefactError
from remix_cli.evaluation.harness_scores import declared_measures
from remix_cli.evaluation.report import Report, TaskResult, read_report
from remix_cli.folders import RunFolder, report_file
from remix_cli.stored_json import Document
from remix_cli.tasks.base import Line, Measure
from remix_cli.tasks.registry import TASKS, task_class


@dataclass(frozen=True)
class TrainingCosts:
    """What a run's summary says of its training; None where it says nothing, as for a base model."""

    method: str | None = None
    trained_parameters: int | None = None
    active_parameters: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    peak_memory_gib: float | None = None

    @classmethod
    def from_summary(cls, summary: Document) -> "TrainingCosts":
        parameters = summary.get("parameters", {})
        return cls(
            summary.get("method"),
            parameters.get("trained"),
            parameters.get("active"),
            summary.get("seconds"),
            summary.get("tokens"),
            summary.get("peak_memory_gib"),
        )


@dataclass
class Evaluated:
    """One report with what belongs to it. Tasks go by the names that the first report of a comparison gives them."""

    label: str
    report: Report
    folder: Path  # that of the report, where the lines are, too
    costs: TrainingCosts

    own_names: dict[str, str] = field(default_factory=dict)  # of tasks that the first report calls otherwise
    lines_read: dict[str, list[Line]] = field(default_factory=dict)  # by task

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder.parent)

    def match(self, first: "Evaluated") -> None:
        """Find the results that answer what the first report's did, whatever they are called: a model folder has no
        recipe that says which rows are its own."""
        for theirs in first.report.results:
            names = [
                result.task
                for result in self.report.results
                if not theirs.protocol.asked.differences(result.protocol.asked)
            ]
            if names and theirs.task not in names:
                self.own_names[theirs.task] = names[0]

    def result(self, task: str) -> TaskResult | None:
        return self.report.result(self.own_names.get(task, task))

    def lines(self, task: str) -> list[Line]:
        """What was kept of every item, in their order. Raises ArtefactError."""
        if task not in self.lines_read:
            name = self.own_names.get(task, task)
            self.lines_read[task] = _read_lines(self.folder / f"{self.report.model}-{name}.jsonl")
        return self.lines_read[task]

    def items(self, task: str) -> list[str]:
        """For each line the hash of what the model was shown. Raises ArtefactError."""
        return [line["prompt"] for line in self.lines(task)]

    def parts(self, task: str, score: str) -> np.ndarray:
        """(2, S) numerators and denominators of the score; the samples of one problem are one item.

        For a task that was scored, and a score of it that can be compared. Raises ArtefactError.
        """
        result = self.result(task)
        assert result is not None
        samples = result.protocol.asked.samples or 1
        try:
            parts = parts_of_lines(self.lines(task), comparable_measures(result)[score], samples)
            is_whole = parts.shape[1] * samples == result.count
        except (KeyError, TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise ArtefactError(
                f"{self.folder}: the lines of {task} are not the {result.count} answers that its report counts, each "
                f"with its {score}; evaluate again with `remix eval`"
            )
        return parts


def load_evaluated(path: Path) -> Evaluated:
    """From a run folder (its last evaluation of the adapter), or a report such as RUN/eval/base.json.

    Raises ArtefactError.
    """
    file = report_file(path)
    report = read_report(file)
    run = file.parent.parent
    label = run.name
    if report.model not in ("adapter", "model"):
        label = f"{run.name}/{report.model}"
    folder = RunFolder(run)
    costs = TrainingCosts()
    if os.path.lexists(folder.summary):
        summary = folder.read_summary()
        if report.model != "base":
            costs = TrainingCosts.from_summary(summary)
    return Evaluated(label, report, file.parent, costs)


def comparable_measures(result: TaskResult) -> dict[str, Measure]:
    """The measures of its task that are made of what each line holds: the others cannot be compared item by item."""
    kind = result.protocol.asked.task
    if kind not in TASKS:
        return declared_measures(result.protocol.asked)
    return {measure.name: measure for measure in task_class(kind).measures if measure.above is not None}


def scores_in_common(results: list[TaskResult]) -> list[str]:
    """Scores that all results of one task have and that can be compared item by item."""
    comparable = comparable_measures(results[0])
    found = []
    for score in results[0].scores:
        if score in comparable and all(score in result.scores for result in results):
            found.append(score)
    return found


def parts_of_lines(lines: list[Line], measure: Measure, samples: int) -> np.ndarray:
    """(2, S) numerators and denominators, each summed over the `samples` lines of an item."""
    assert measure.above is not None
    numerators = [float(line[measure.above]) for line in lines]
    denominators = [1.0] * len(lines)
    if measure.below:
        denominators = [float(line[measure.below]) for line in lines]
    by_line = np.array([numerators, denominators])  # (2, S * samples)
    return by_line.reshape(2, -1, samples).sum(-1)


def _read_lines(path: Path) -> list[Line]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if any(not isinstance(line["prompt"], str) for line in lines):
            raise ValueError("a prompt that is no text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); evaluate again with `remix eval`") from None
    return lines
