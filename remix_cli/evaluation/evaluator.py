"""`remix eval` from start to end: score the tasks, keep every answer, stamp the report with how it was made."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

import remix_cli
from remix_cli.errors import ArtefactError, RecipeError
from remix_cli.evaluation.answers import Lines, open_lines
from remix_cli.evaluation.crew import Crew
from remix_cli.evaluation.report import Evaluation, ModelStamp, Protocol, Report, TaskResult
from remix_cli.recipe import Recipe, Task
from remix_cli.recipe.schema import labelled
from remix_cli.runs import LoadedRun
from remix_cli.sandbox import outside as sandbox
from remix_cli.storage import write_json
from remix_cli.stored_json import Damaged, read_object
from remix_cli.tasks.base import Scorer, Settings
from remix_cli.tasks.registry import task_class

Progress = Callable[[str, int, int], Any]  # (task, total, done) -> an object with advance(n, value)


def evaluate(
    run: LoadedRun, tasks: list[Task], settings: Settings, progress: Progress, crew: Crew | None = None
) -> Evaluation:
    """Score `tasks`; write `eval/<name>.json` and `eval/<name>-<task>.jsonl`.

    Answers that an interrupted evaluation of the same kind has left are not asked for again. `crew`: the processes that
    score together, of which this is the first; the others call `assist`. Raises RecipeError if programs would have to
    be run and are not allowed, SandboxError if they cannot be confined, DataError.
    """
    crew = crew or Crew()
    check_code(tasks, settings)
    name = report_name(run.which, settings)
    target = run.folder.evaluations / f"{name}.json"
    with ExitStack() as scope:
        scope.enter_context(as_asked(run, settings))
        scorers = _labelled_scorers(run, tasks, settings, target)
        finished: list[Lines] = []
        results: list[TaskResult] = []
        for label, scorer in scorers.items():
            protocol = Protocol(scorer.stamp(), model_stamp(run, settings))
            lines = scope.enter_context(open_lines(run.folder.evaluations, f"{name}-{label}", protocol.to_dict()))
            results.append(_score(label, scorer, lines, protocol, progress, crew))
            finished.append(lines)
        earlier, notes = earlier_results(target)
        everything = Report(name, results + others_of_the_model(earlier, results))
        write_json(target, everything.to_dict())
        for lines in finished:  # only now: until here an interruption must find them
            lines.publish()
    return Evaluation(Report(name, results), target, notes)


def assist(run: LoadedRun, tasks: list[Task], settings: Settings, crew: Crew) -> None:
    """Answer this process's share of what the first one evaluates; it is handed over, and nothing is written."""
    with as_asked(run, settings):
        for task in tasks:
            scorer = task_class(task.task)(run, task, settings)
            with scorer.subject.adapter.unchanging():
                for _ in crew.answers(scorer, []):
                    pass


def as_asked(run: LoadedRun, settings: Settings) -> AbstractContextManager[None]:
    """Context: without the adapter, or with other LoRAs active, if so asked."""
    if settings.base:
        return run.adapter.disabled()
    if settings.active is not None:
        return run.adapter.activating(settings.active)
    return nullcontext()


HELD_OUT = "held out"  # what the recipe's own held-out rows are called
OTHER_DATA = "@"  # parts a task's name from that of a data set which is not the recipe's


def _labelled_scorers(run: LoadedRun, tasks: list[Task], settings: Settings, target: Path) -> dict[str, Scorer]:
    """A scorer for each task, by what its result is called.

    Where the report already holds a result of that name for another file of the same name, this one's says which
    rows it is of.
    """
    earlier, _ = earlier_results(target)
    kept = {result.task: result.protocol.asked.data for result in earlier}
    scorers = {}
    for label, task in zip(result_labels(run.recipe, tasks), tasks, strict=True):
        scorer = task_class(task.task)(run, task, settings)
        data = scorer.stamp().data
        if OTHER_DATA in label and kept.get(label, data) != data:
            label = f"{label}-{data[:6]}"
        scorers[label] = scorer
    return scorers


def result_labels(recipe: Recipe, tasks: list[Task]) -> list[str]:
    """What the results of `tasks` are called: as the recipe labels them, and on other rows `gsm8k@rows`.

    So the score of another data set stands beside the run's own, never in its place.
    """
    labels: list[str] = []
    for task in tasks:
        label = _label_in_recipe(recipe, task, labels) or _label_elsewhere(recipe, task)
        while label in labels:
            label += "-again"
        labels.append(label)
    return labels


def _label_in_recipe(recipe: Recipe, task: Task, taken: list[str]) -> str | None:
    """The recipe's label of a task of this kind on the same rows; None if there is none that is not yet taken."""
    for label, known in labelled(recipe.eval.tasks):
        if known.task == task.task and known.source == task.source and label not in taken:
            return label
    return None


def _label_elsewhere(recipe: Recipe, task: Task) -> str:
    own_sources = [known.source for known in recipe.eval.tasks if known.task == task.task]
    if task.source is None or task.source in own_sources:
        return task.task
    file = Path(task.source.place).stem
    return f"{task.task}{OTHER_DATA}{re.sub(r'[^A-Za-z0-9_.-]+', '_', file)[:80]}"


def earlier_results(target: Path) -> tuple[list[TaskResult], list[str]]:
    """The results that the report already holds; a line if there is a report that cannot be read."""
    if not os.path.lexists(target):
        return [], []
    try:
        return Report.from_dict(read_object(target)).results, []
    except (ArtefactError, Damaged):
        return [], [f"{target}: was damaged, so the scores of other tasks in it are gone; evaluate those again"]


def others_of_the_model(earlier: list[TaskResult], results: list[TaskResult]) -> list[TaskResult]:
    """Earlier results of other tasks by the same model."""
    scored_now = {result.task for result in results}
    model = results[0].protocol.answered_by
    return [
        result for result in earlier if result.task not in scored_now and result.protocol.answered_by.same_model(model)
    ]


def _score(label: str, scorer: Scorer, lines: Lines, protocol: Protocol, progress: Progress, crew: Crew) -> TaskResult:
    """Ask for every item that `lines` does not hold yet, and make the scores of all."""
    begun = time.monotonic()
    count = len(scorer.keys)
    todo = [item for item in range(count) if item not in lines.done]
    bar = progress(label, count, len(lines.done))
    with scorer.subject.adapter.unchanging():
        for item, line in crew.answers(scorer, todo):
            lines.add(item, {"prompt": scorer.keys[item]} | line)
            bar.advance(1, float(line[scorer.headline]))
    scores = scorer.scores([lines.done[item] for item in range(count)])
    as_asked = scorer.task.model_copy(update={"limit": scorer.limit})
    seconds = round(time.monotonic() - begun, 3)
    digest = task_digest(as_asked)
    return TaskResult(label, count, scores, seconds, len(todo), protocol, digest, rows_name(label, scorer.task))


def rows_name(label: str, task: Task) -> str | None:
    """What the rows of `task` are called; None where its own name or its label says so, or it brings them."""
    if task.name is not None or OTHER_DATA in label:
        return None
    if task.source is not None:
        return task.source.place
    return None if task_class(task.task).brings_rows else HELD_OUT


def task_digest(task: Task) -> str:
    """A hash of the task as it is asked, its limit included, so that a sweep knows whether a result answers it."""
    return hashlib.sha256(task.model_dump_json().encode()).hexdigest()[:16]


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
    name = which
    if settings.active:
        name += f"-k{settings.active}"
    if settings.sampled:
        name += "-sampled"
    return name


def model_stamp(run: LoadedRun, settings: Settings) -> ModelStamp:
    config = run.adapter.config
    routing = "none"
    if config.routed and not settings.base:
        rule = "sampled" if settings.sampled else "top"
        routing = f"{rule} {settings.active or config.active} of {config.pool_size} by {config.level}"
    works = json.dumps((run.identity.base_settings, run.identity.tokenizer_probe), sort_keys=True)
    return ModelStamp(
        model=run.recipe.model.name_or_path,
        base_fingerprint=run.identity.base_fingerprint[:16],
        base_works=hashlib.sha256(works.encode()).hexdigest()[:16],
        adapter=None if settings.base else run.stored.weights_sha256[:16],
        method=config.method,
        routing=routing,
        dtype=run.recipe.model.dtype,
        device=run.device.type,
        versions={
            "remix": remix_cli.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
