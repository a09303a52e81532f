"""What the flags of `remix eval` ask for, as tasks of a recipe."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from remix_cli.core.config import AdapterConfig
from remix_cli.data.formats.registry import FORMATS
from remix_cli.errors import RecipeError
from remix_cli.recipe import Recipe, Source, Task
from remix_cli.recipe.schema import OF_ANSWERS
from remix_cli.tasks.registry import TASKS, task_class

Changes = Mapping[str, float | None]  # of a task's keys by flags; None where the flag was not given


def requested_tasks(
    recipe: Recipe,
    names: list[str] | None,
    data: str | None,
    changes: Changes,
    shots_from: str | None,
    data_format: str | None = None,
) -> list[Task]:
    """The recipe's tasks, or those named, as the flags change them. Raises RecipeError."""
    if data_format is not None and (data is None or data_format not in FORMATS):
        raise RecipeError(f"--data-format: {data_format!r}: with --data, one of {', '.join(FORMATS)}")
    tasks = _named_tasks(recipe, names)
    given = {key: value for key, value in changes.items() if value is not None}
    if shots_from is not None and not any(given.get("shots", task.shots) for task in tasks):
        raise RecipeError("--shots-from: say with --shots how many solved examples to take from it")
    generating = any(task_class(task.task).generates for task in tasks)
    made: list[Task] = []
    for task in tasks:
        task = override_source(recipe, task, data)
        if data_format is not None and task.source is not None:
            source = task.source.model_copy(update={"format": data_format})
            task = task.model_copy(update={"source": source})
        update: dict[str, Any] = dict(given)
        if generating and not task_class(task.task).generates:  # the flags are for the others
            for key in OF_ANSWERS:
                update.pop(key, None)
        if shots_from is not None:
            example = task.source or _source_of(task, shots_from)
            update["shots_from"] = example.at(shots_from)
        try:
            asked = Task(**(dict(task) | update))
        except ValidationError as error:
            raise RecipeError(*(_in_flags(problem) for problem in error.errors())) from None
        if asked not in made:  # two tasks of a kind may be the same on one file
            made.append(asked)
    return made


def _named_tasks(recipe: Recipe, names: list[str] | None) -> list[Task]:
    """Of each name all tasks that the recipe has of that kind, else the kind with its defaults; without names the
    recipe's. Raises RecipeError for a name that is none."""
    if not names:
        return list(recipe.eval.tasks)
    for name in names:
        if name not in TASKS:
            raise RecipeError(f"--task: {name!r} is not a task; use {', '.join(TASKS)}")
    tasks = []
    for name in names:
        of_kind = [task for task in recipe.eval.tasks if task.task == name]
        tasks += of_kind or [Task(task=name)]
    return tasks


def _in_flags(problem: ErrorDetails) -> str:
    """A problem of a task that the flags made, in their names."""
    message = problem["msg"]
    below = problem.get("ctx", {}).get("below")
    if below is None:
        return f"--{message.removeprefix('Value error, ')}"
    key = below[-1]
    if key not in OF_ANSWERS:  # only a format can have been given that the task does not read
        return f"--data-format: {message}"
    return f"--{key.replace('_', '-')}: {message}"


def refuse_flags_of_an_adapter(flags: Mapping[str, object], reason: str) -> None:
    """Raises RecipeError if one of `flags` is given."""
    for flag, value in flags.items():
        if value:
            raise RecipeError(f"{flag}: is of an adapter, and {reason}")


def requested_active(text: str | None, config: AdapterConfig, sampled: bool) -> list[int | None]:
    """`1,2,4` as numbers; [None] for the trained k. Raises RecipeError, also for what needs a router without one."""
    if (text is not None and not config.routed) or (sampled and not config.samples):
        raise RecipeError(
            f"--selection sample and --active are for adapters that choose k of n LoRAs; this is {config.method}, "
            f"{config.active} of {config.pool_size}"
        )
    if text is None:
        return [None]
    pool_size = config.pool_size
    try:
        many = [int(part) for part in text.split(",")]
    except ValueError:
        many = []
    if not many or min(many) < 1 or max(many) > pool_size:
        raise RecipeError(f"--active: {text!r}: give numbers between 1 and {pool_size}, for example 1,2,4")
    return list(many)


def override_source(recipe: Recipe, task: Task, path: str | None) -> Task:
    """The task on another file: in its own format where it has one, else in that of the recipe's first source."""
    if path is None:
        return task
    source = task.source
    if source is None:
        kind = task_class(task.task)
        of_its_own = kind.row_format is not None or kind.own_columns or kind.brings_rows
        source = _source_of(task, path) if of_its_own else recipe.data.train[0]
    return task.model_copy(update={"source": source.at(path)})


def _source_of(task: Task, path: str) -> Source:
    """The file in the format of the task's rows, where it declares one."""
    row_format = task_class(task.task).row_format
    if row_format is None:
        return Source(path=path)
    return Source.model_validate({"path": path, "format": row_format})


def all_bring_rows(names: list[str]) -> bool:
    """Do the tasks of these names need no file? Not so for a name that is none."""
    return all(name in TASKS and task_class(name).brings_rows for name in names)
