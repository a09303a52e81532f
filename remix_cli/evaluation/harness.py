"""`remix eval RUN --lm-eval TASKS`: tasks of lm-evaluation-harness on the model as it is loaded here.

Results go where ours go: the report, the lines of every item, and with both `remix compare`.
"""

import difflib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remix_cli.compat.datasets import say_nothing
from remix_cli.errors import DataError, RecipeError, shortened
from remix_cli.evaluation.answers import open_lines
from remix_cli.evaluation.evaluator import (
    Progress,
    as_asked,
    earlier_results,
    model_stamp,
    others_of_the_model,
    report_name,
)
from remix_cli.evaluation.harness_scores import Found, found_of, label_of, lines_of, measures_of, scores_of, stamp_of
from remix_cli.evaluation.report import Evaluation, ModelStamp, Protocol, Report, TaskResult
from remix_cli.launch import launch_size
from remix_cli.runs import LoadedRun
from remix_cli.storage import write_json, write_text
from remix_cli.tasks.base import Line, Settings

KEPT = "lm-eval"  # the file of answers while an evaluation is under way
RESAMPLES = 1000  # of the harness's bootstrap, for scores that are no means


@dataclass(frozen=True)
class Loaded:
    """Tasks, groups and tags of the harness as objects of its own, with their data."""

    objects: list[Any]
    manager: Any  # its index of all tasks, which takes it long to make

    @property
    def tasks(self) -> dict[str, Any]:
        """Every single task by name, those of groups included."""
        found: dict[str, Any] = {}
        for one in self.objects:
            tasks = one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one]
            found |= {task.task_name: task for task in tasks}
        return found


@dataclass(frozen=True)
class Asked:
    """Which tasks of the harness, and how."""

    loaded: Loaded
    shots: int | None = None  # None: as each task says
    chat: bool = False  # ask through the tokenizer's chat template


def load_tasks(text: str, folder: Path | None) -> Loaded:
    """The tasks, groups and tags that `text` names, with commas between them; `folder` holds more of them as YAML.

    Before any model is loaded. Raises RecipeError for a name that is none, what cannot be asked here, or where
    lm-eval is not installed; DataError for data that cannot be had.
    """
    if launch_size() > 1:
        raise RecipeError("--lm-eval: is asked in one process; leave accelerate launch out")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise RecipeError("--lm-eval: lm-eval is not installed; pip install 'remix-cli[lm-eval]'") from None
    from remix_cli.compat.lm_eval import quiet

    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if not names:
        raise RecipeError("--lm-eval: give names of tasks with commas between them, for example arc_easy,hellaswag")
    if folder is not None and not folder.is_dir():
        raise RecipeError(f"--lm-eval-path: {folder}: no such folder; give the one that holds your tasks' YAML files")
    say_nothing()
    with quiet():
        manager = _manager_for(names, folder)
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            raise RecipeError(*(_not_a_task(name, manager.all_tasks) for name in unknown))
        objects: list[Any] = []
        for name in names:
            objects += _load(name, manager)
    loaded = Loaded(objects, manager)
    _check(loaded)
    return loaded


def _manager_for(names: list[str], folder: Path | None) -> Any:
    """The harness's index. Reading its own 14,000 files takes long, so that is left out where `folder` has all."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _not_a_task(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    advice = f"did you mean {', '.join(near)}?" if near else "lm_eval ls tasks lists all"
    return f"--lm-eval: {name!r} is no task of lm-eval; {advice}"


def _load(name: str, manager: Any) -> list[Any]:
    """What the name stands for: a group, or one or several tasks."""
    try:
        found = manager.load([name])
    except ConnectionError as error:
        raise DataError(
            f"--lm-eval: {name}: its data are not on this machine ({shortened(str(error))}); load them once with a "
            "connection and without HF_HUB_OFFLINE"
        ) from None
    except Exception as error:  # of a task's own code and of whatever reads its data
        reason = shortened(str(error)) or type(error).__name__
        raise DataError(f"--lm-eval: {name}: cannot be loaded: {reason}") from None
    groups = found.get("groups") or {}
    return [groups[name]] if name in groups else list(found["tasks"].values())


def _check(loaded: Loaded) -> None:
    """Raises RecipeError for tasks that cannot be asked here."""
    for name, task in loaded.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(
                f"--lm-eval: {name}: would run what the model writes, unconfined; --task humaneval runs it confined"
            )
        if getattr(task, "MULTIMODAL", False):
            raise RecipeError(f"--lm-eval: {name}: shows pictures or sounds, and this reads text; leave it out")


def evaluate_by_harness(
    run: LoadedRun, asked: Asked, settings: Settings, progress: Progress, limit: int | None = None
) -> Evaluation:
    """Ask `run` the tasks; write `eval/<name>.json` and `eval/<name>-lm-eval-<task>.jsonl`.

    Answers that an interrupted evaluation of the same model has left are not asked for again. `limit`: the first so
    many rows of each task, as the harness counts. Raises DataError where it cannot ask.
    """
    import lm_eval

    from remix_cli.compat.lm_eval import quiet
    from remix_cli.evaluation.harness_model import Answered, RoutedLM

    begun = time.monotonic()
    name = report_name(run.which, settings)
    folder = run.folder.evaluations
    target = folder / f"{name}.json"
    version = _version()
    stamp = model_stamp(run, settings)
    with (
        quiet(),
        as_asked(run, settings),
        open_lines(folder, f"{name}-{KEPT}", {"lm_eval": version} | stamp.to_dict()) as kept,
    ):
        answered = Answered(kept)
        lm = RoutedLM(run, answered, progress)
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=asked.loaded.objects,
                task_manager=asked.loaded.manager,
                num_fewshot=asked.shots,
                limit=limit,
                bootstrap_iters=RESAMPLES,
                apply_chat_template=asked.chat,
                log_samples=True,
            )
        except (ValueError, AssertionError) as error:  # the harness's own refusals
            raise DataError(f"--lm-eval: cannot be asked: {shortened(str(error)) or type(error).__name__}") from None
        assert results is not None  # of the first process, and there is one
        template = lm.chat_template(True) if asked.chat else None
        seconds = round(time.monotonic() - begun, 3)
        found = [found_of(results, task) for task in asked.loaded.tasks]
        texts, made, notes = {}, [], _notes_on_groups(results)
        for one in found:
            lines = lines_of(one)
            result, more = _result(one, lines, template, version, stamp, seconds, answered.earlier)
            texts[f"{name}-{result.task}.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines)
            made.append(result)
            notes += more
        earlier, damaged = earlier_results(target)
        for file, text in texts.items():
            write_text(folder / file, text)
        write_json(target, Report(name, made + others_of_the_model(earlier, made)).to_dict())
        kept.path.unlink()  # only now: until here an interruption must find it
    return Evaluation(Report(name, made), target, damaged + notes)


def _result(
    found: Found,
    lines: list[Line],
    template: str | None,
    version: str,
    stamp: ModelStamp,
    seconds: float,
    earlier: frozenset[str],
) -> tuple[TaskResult, list[str]]:
    """The result of one task, and notes. `seconds`: of all tasks together, whose requests are mixed; `earlier`: the
    requests that had been answered before."""
    measures = measures_of(found, lines)
    scores, notes = scores_of(found, lines, measures)
    protocol = Protocol(stamp_of(found, lines, measures, template, version), stamp)
    count = len(lines) - _answered_before(found, earlier)
    return TaskResult(label_of(found.name), len(lines), scores, seconds, count, protocol), notes


def _answered_before(found: Found, earlier: frozenset[str]) -> int:
    """Items all of whose requests are among `earlier`."""
    from remix_cli.evaluation.harness_model import request_key

    kind = str(found.config["output_type"])
    if kind == "multiple_choice":
        kind = "loglikelihood"
    items = {}
    for sample in found.samples:
        items[sample["doc_id"]] = all(request_key(kind, asked) in earlier for asked in sample["arguments"])
    return sum(items.values())


def _notes_on_groups(results: Any) -> list[str]:
    """A line for each group: the harness's own means over its tasks."""
    notes = []
    for name, scores in (results.get("groups") or {}).items():
        said = []
        for key, value in scores.items():
            metric, comma, _ = key.partition(",")
            if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
                said.append(f"{metric} {value:.4f}")
        notes.append(f"{name}: {', '.join(said)}, lm-eval's means over its tasks")
    return notes


def _version() -> str:
    from importlib.metadata import version

    return version("lm-eval")
