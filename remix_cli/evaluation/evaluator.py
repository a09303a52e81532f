"""`remix eval` from start to end: score the tasks, keep every answer, stamp the report with how it was made."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

import remix_cli
from remix_cli.errors import RecipeError
from remix_cli.evaluation.answers import Lines, open_lines
from remix_cli.recipe import Recipe, Task
from remix_cli.recipe.schema import labelled
from remix_cli.runs import LoadedRun
from remix_cli.sandbox import outside as sandbox
from remix_cli.storage import write_json
from remix_cli.tasks.base import Scorer, Settings
from remix_cli.tasks.registry import task_class

Progress = Callable[[str, int, int], Any]  # (task, total, done) -> an object with advance(n, value)


def evaluate(run: LoadedRun, tasks: list[Task], settings: Settings, progress: Progress) -> dict[str, Any]:
    """Score `tasks`; write `eval/<name>.json` and `eval/<name>-<task>.jsonl` and return the report.

    Answers that an interrupted evaluation of the same kind has left are not asked for again. Raises RecipeError if
    programs would have to be run and are not allowed, SandboxError if they cannot be confined, DataError.
    """
    check_code(tasks, settings)
    name = report_name(run.which, settings)
    with ExitStack() as scope:
        if settings.base:
            scope.enter_context(run.adapter.disabled())
        elif settings.active is not None:
            scope.enter_context(run.adapter.activating(settings.active))
        target = run.folder.evaluations / f"{name}.json"
        kept = {r["task"]: r["protocol"]["data"] for r in _earlier(target)[0]}
        scorers = {}
        for label, task in zip(result_labels(run.recipe, tasks), tasks, strict=True):
            scorer = task_class(task.task)(run, task, settings)
            data = scorer.stamp()["data"]
            if OTHER_DATA in label and kept.get(label, data) != data:  # another file of the same name
                label = f"{label}-{data[:6]}"
            scorers[label] = scorer
        finished: list[Lines] = []
        results = []
        for label, scorer in scorers.items():
            stamp = scorer.stamp() | _model(run, settings)
            lines = scope.enter_context(open_lines(run.folder.evaluations, f"{name}-{label}", stamp))
            results.append(_score(label, scorer, lines, stamp, progress) | {"task_digest": task_digest(_asked(scorer))})
            finished.append(lines)
        earlier, notes = _earlier(target)
        report = {"model": name, "results": results + _of_the_same(earlier, results)}
        write_json(target, report)
        for lines in finished:  # only now: until here an interruption must find them
            lines.publish()
    return report | {"results": results, "file": str(target), "notes": notes}


OTHER_DATA = "@"  # parts a task's name from that of a data set which is not the recipe's


def result_labels(recipe: Recipe, tasks: list[Task]) -> list[str]:
    """What the results of `tasks` are called: as the recipe labels them, and on other rows `gsm8k@rows`.

    So the score of another data set stands beside the run's own, never in its place.
    """
    own = labelled(recipe.eval.tasks)
    labels: list[str] = []
    for task in tasks:
        same = (name for name, known in own if (known.task, known.source) == (task.task, task.source))
        label = next((name for name in same if name not in labels), None)
        if label is None:
            sources = [known.source for _, known in own if known.task == task.task]
            elsewhere = task.source is not None and task.source not in sources
            name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(task.source.place).stem)[:80] if task.source else ""
            label = f"{task.task}{OTHER_DATA}{name}" if elsewhere else task.task
        while label in labels:
            label += "-again"
        labels.append(label)
    return labels


def _earlier(target: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The results that the report already holds; a line if there is a report that cannot be read."""
    if not os.path.lexists(target):
        return [], []
    try:
        results = json.loads(target.read_text(encoding="utf-8"))["results"]
        for r in results:
            _ = r["task"], r["protocol"]["data"], _weights(r)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [], [f"{target}: was damaged, so the scores of other tasks in it are gone; evaluate those again"]
    return results, []


def _weights(result: dict[str, Any]) -> tuple[Any, ...]:
    """By what weights a result was made."""
    return result["protocol"]["base_fingerprint"], result["protocol"]["adapter"]


def _of_the_same(earlier: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier results of other tasks by the same model."""
    labels = {result["task"] for result in results}
    same, works = _weights(results[0]), results[0]["protocol"]["base_works"]
    others = [r for r in earlier if r["task"] not in labels and _weights(r) == same]
    return [r for r in others if r["protocol"].get("base_works", works) == works]  # earlier versions did not say


def _score(label: str, scorer: Scorer, lines: Lines, stamp: dict[str, Any], progress: Progress) -> dict[str, Any]:
    begun = time.monotonic()
    todo = [i for i in range(len(scorer.keys)) if i not in lines.done]
    bar = progress(label, len(scorer.keys), len(lines.done))
    with scorer.subject.adapter.unchanging():
        for i, line in scorer.run(todo):
            lines.add(i, {"prompt": scorer.keys[i]} | line)
            bar.advance(1, float(line[scorer.headline]))
    scores = scorer.scores([lines.done[i] for i in range(len(scorer.keys))])
    return {
        "task": label,
        "count": len(scorer.keys),
        "scores": {key: score.value for key, score in scores.items()},
        "intervals": {key: [score.low, score.high] for key, score in scores.items()},
        "counts": {key: score.count for key, score in scores.items()},
        "shares": sorted(key for key, score in scores.items() if score.share),
        "seconds": round(time.monotonic() - begun, 3),
        "asked": len(todo),
        "protocol": stamp,
    }


def task_digest(task: Task) -> str:
    """A hash of the task as the recipe has it, so that a sweep knows whether a result answers it."""
    return hashlib.sha256(task.model_dump_json().encode()).hexdigest()[:16]


def _asked(scorer: Scorer) -> Task:
    """The task as it was asked, `--limit` included."""
    return scorer.task.model_copy(update={"limit": scorer.limit})


def check_code(tasks: list[Task], settings: Settings) -> None:
    """Before anything is loaded or generated. Raises RecipeError or SandboxError."""
    running = [task.task for task in tasks if task_class(task.task).runs_code]
    if not running:
        return
    if not settings.allow_code:
        raise RecipeError(
            f"eval task {running[0]} runs programs that the model writes; add --allow-code-execution "
            "(they are confined, see docs/sandbox.md)"
        )
    sandbox.check_available()


def report_name(which: str, settings: Settings) -> str:
    """`adapter`, `best`, `base` or `model`, and how it was evaluated if not as usual."""
    if settings.base:
        return "model" if which == "model" else "base"
    return which + (f"-k{settings.active}" if settings.active else "") + ("-sampled" if settings.sampled else "")


def _model(run: LoadedRun, settings: Settings) -> dict[str, Any]:
    config = run.adapter.config
    rule = f"{'sampled' if settings.sampled else 'top'} {settings.active or config.active} of {config.pool_size}"
    works = run.identity.base_settings, run.identity.tokenizer_probe
    routing = f"{rule} by {config.level}" if config.routed and not settings.base else "none"
    return {
        "model": run.recipe.model.name_or_path,
        "base_fingerprint": run.identity.base_fingerprint[:16],
        "base_works": hashlib.sha256(json.dumps(works, sort_keys=True).encode()).hexdigest()[:16],
        "adapter": None if settings.base else run.stored.weights_sha256[:16],
        "method": config.method,
        "routing": routing,
        "dtype": run.recipe.model.dtype,
        "device": run.device.type,
        "versions": {
            "remix": remix_cli.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
