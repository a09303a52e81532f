"""`remix compare`: the same items under several models, item by item."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from remix_cli.errors import ArtefactError, RecipeError
from remix_cli.evaluation.statistics import paired_difference
from remix_cli.folders import RunFolder, read_report, report_file
from remix_cli.tasks.base import Measure
from remix_cli.tasks.registry import TASKS, task_class

# What must agree for two scores to mean the same.
SAME = ("task", "data", "prompt_template", "shots", "decoding", "chat_template", "prompts", "protocol", "samples")


@dataclass
class Evaluated:
    """One report, its lines, and what is known of the run that it belongs to."""

    label: str
    report: dict[str, Any]
    folder: Path
    summary: dict[str, Any]

    read: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # lines by task
    own_name: dict[str, str] = field(default_factory=dict)  # of a task that the first report calls otherwise

    def result(self, task: str) -> dict[str, Any] | None:
        """The result of a task under the first report's name for it."""
        name = self.own_name.get(task, task)
        return next((r for r in self.report["results"] if r["task"] == name), None)

    def lines(self, task: str) -> list[dict[str, Any]]:
        if task not in self.read:
            self.read[task] = self._read(self.own_name.get(task, task))
        return self.read[task]

    def match(self, first: "Evaluated") -> None:
        """Find the results that answer what the first report's did, whatever they are called: a model folder has no
        recipe that says which rows are its own."""
        for theirs in first.report["results"]:
            candidates = [r for r in self.report["results"] if not difference_of_protocols(theirs, r)]
            names = [r["task"] for r in candidates]
            if names and theirs["task"] not in names:
                self.own_name[theirs["task"]] = names[0]

    def _read(self, task: str) -> list[dict[str, Any]]:
        path = self.folder / f"{self.report['model']}-{task}.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            if any(not isinstance(line["prompt"], str) for line in lines):
                raise ValueError("a prompt that is no text")
            return lines
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtefactError(f"{path}: cannot be read ({error}); evaluate again with `remix eval`") from None


def load_evaluated(path: Path) -> Evaluated:
    """From a run folder (its last evaluation of the adapter), or a report such as RUN/eval/base.json.

    Raises ArtefactError.
    """
    file = report_file(path)
    report = read_report(file)
    run = file.parent.parent
    folder = RunFolder(run)
    summary = folder.read_summary() if os.path.lexists(folder.summary) else {}
    label = run.name if report["model"] in ("adapter", "model") else f"{run.name}/{report['model']}"
    return Evaluated(label, report, file.parent, {} if report["model"] == "base" else summary)


def compare(paths: list[Path]) -> dict[str, Any]:
    """Scores of every task that all have, with the paired difference of each from the first.

    A task that two of them were not asked the same is skipped. Raises RecipeError if that leaves none.
    """
    if len(paths) < 2:
        raise RecipeError("compare needs two runs or more")
    runs = [load_evaluated(path) for path in paths]
    for run in runs[1:]:
        run.match(runs[0])
    asked = [r["task"] for r in runs[0].report["results"]]
    results = [{task: r for task in asked if (r := run.result(task)) is not None} for run in runs]
    tasks = [task for task in asked if all(task in found for found in results)]
    if not tasks:
        had = "; ".join(f"{run.label}: {', '.join(r['task'] for r in run.report['results'])}" for run in runs)
        raise RecipeError(f"no task was evaluated in all of them ({had})")
    skipped = []
    for task in list(tasks):
        for run, found in zip(runs[1:], results[1:], strict=True):
            different = difference_of_protocols(results[0][task], found[task])
            if different and task in tasks:
                tasks.remove(task)
                skipped.append(f"{task}: {runs[0].label} and {run.label} were not asked the same ({different})")
    if not tasks:
        raise RecipeError(*(f"{line}; evaluate both with the same task, data and --limit" for line in skipped))
    return {
        "runs": [_describe(run) for run in runs],
        "tasks": {task: _task(task, runs, [found[task] for found in results]) for task in tasks},
        "skipped": skipped,
    }


def difference_of_protocols(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Which parts of two stamps forbid a comparison; empty if none."""
    return ", ".join(f"other {key}" for key in SAME if a["protocol"].get(key) != b["protocol"].get(key))


def _task(task: str, runs: list[Evaluated], results: list[dict[str, Any]]) -> dict[str, Any]:
    """{score: one entry per run}."""
    items = [[line["prompt"] for line in run.lines(task)] for run in runs]
    if any(found != items[0] for found in items):
        raise ArtefactError(f"{task}: the per-example files do not hold the same items; evaluate again")
    found: dict[str, Any] = {"items": len(items[0]), "scores": {}}
    for score in scores_in_common(results):
        parts = [parts_of(run, task, score) for run in runs]
        entries = []
        for result, part in zip(results, parts, strict=True):
            entry = {"value": result["scores"][score], "interval": result["intervals"][score]}
            if part is not parts[0]:
                difference = paired_difference(parts[0], part)
                entry |= {"difference": difference.value, "difference_interval": [difference.low, difference.high]}
            entries.append(entry | {"share": score in result["shares"]})
        found["scores"][score] = entries
    return found


def scores_in_common(results: list[dict[str, Any]]) -> list[str]:
    """Scores that all results of one task have and that can be compared item by item."""
    comparable = _comparable(results[0])
    return [s for s in results[0]["scores"] if s in comparable and all(s in r["scores"] for r in results)]


def _comparable(result: dict[str, Any]) -> dict[str, Measure]:
    """The measures of its task that are made of what each line holds."""
    kind = result["protocol"]["task"]
    measures = task_class(kind).measures if kind in TASKS else ()
    return {measure.name: measure for measure in measures if measure.above is not None}


def parts_of(run: Evaluated, task: str, score: str) -> np.ndarray:
    """(2, S) numerators and denominators of the score; the samples of one problem are one item."""
    result = run.result(task)
    assert result is not None  # who asks has found it there
    samples = result["protocol"].get("samples", 1)
    try:
        parts = parts_of_lines(run.lines(task), _comparable(result)[score], samples)
        whole = parts.shape[1] * samples == result["count"]
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ArtefactError(
            f"{run.folder}: the lines of {task} are not the {result['count']} answers that its report counts, each "
            f"with its {score}; evaluate again with `remix eval`"
        )
    return parts


def parts_of_lines(lines: list[dict[str, Any]], measure: Measure, samples: int) -> np.ndarray:
    assert measure.above is not None
    numerators = [float(line[measure.above]) for line in lines]
    denominators = [float(line[measure.below]) if measure.below else 1.0 for line in lines]
    return np.array([numerators, denominators]).reshape(2, -1, samples).sum(-1)


def _describe(run: Evaluated) -> dict[str, Any]:
    parameters = run.summary.get("parameters", {})
    return {
        "run": run.label,
        "method": run.summary.get("method"),
        "trained_parameters": parameters.get("trained"),
        "active_parameters": parameters.get("active"),
        "train_seconds": run.summary.get("seconds"),
        "train_tokens": run.summary.get("tokens"),
    }
