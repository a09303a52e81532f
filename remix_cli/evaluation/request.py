"""What the flags of `remix eval` ask for, as tasks of a recipe."""

from typing import Any

from pydantic import ValidationError

from remix_cli.core.config import AdapterConfig
from remix_cli.data.formats.registry import FORMATS
from remix_cli.errors import RecipeError
from remix_cli.recipe import Recipe, Source, Task
from remix_cli.recipe.schema import OF_ANSWERS
from remix_cli.tasks.registry import TASKS, task_class


def requested_tasks(
    recipe: Recipe,
    names: list[str] | None,
    data: str | None,
    changes: dict[str, Any],
    shots_from: str | None,
    data_format: str | None = None,
) -> list[Task]:
    """The recipe's tasks, or those named, as the flags change them. Raises RecipeError."""
    if data_format is not None and (data is None or data_format not in FORMATS):
        raise RecipeError(f"--data-format: {data_format!r}: with --data, one of {', '.join(FORMATS)}")
    unknown = [name for name in names or [] if name not in TASKS]
    if unknown:
        raise RecipeError(f"--task: {unknown[0]!r} is not a task; use {', '.join(TASKS)}")
    tasks = list(recipe.eval.tasks)
    if names:
        tasks = [task for name in names for task in _of_kind(recipe, name)]
    changed = {key: value for key, value in changes.items() if value is not None}
    if shots_from is not None and not any(changed.get("shots", task.shots) for task in tasks):
        raise RecipeError("--shots-from: say with --shots how many solved examples to take from it")
    generating = any(task_class(task.task).generates for task in tasks)
    made: list[Task] = []
    for task in tasks:
        task = override_source(recipe, task, data)
        if data_format is not None and task.source is not None:
            task = task.model_copy(update={"source": task.source.model_copy(update={"format": data_format})})
        update = dict(changed)
        kind = task_class(task.task)
        if generating and not kind.generates:  # the flags are for the others
            update = {key: value for key, value in update.items() if key not in OF_ANSWERS}
        if shots_from is not None:
            example = task.source or Source(path=shots_from, **_row_format(task))
            update["shots_from"] = example.at(shots_from)
        try:
            asked = Task(**(dict(task) | update))
        except ValidationError as error:
            raise RecipeError(*(_flag(e["msg"], e.get("ctx", {})) for e in error.errors())) from None
        if asked not in made:  # two tasks of a kind may be the same on one file
            made.append(asked)
    return made


def _of_kind(recipe: Recipe, name: str) -> list[Task]:
    """The recipe's tasks of this kind, all of them; else the kind with its defaults."""
    return [task for task in recipe.eval.tasks if task.task == name] or [Task(task=name)]


def _flag(message: str, context: dict[str, Any]) -> str:
    """A problem of a task that the flags made."""
    if "below" in context:  # else only a format can have been given that the task does not read
        key = context["below"][-1]
        return f"--{key.replace('_', '-') if key in OF_ANSWERS else 'data-format'}: {message}"
    return f"--{message.removeprefix('Value error, ')}"


def refuse_flags_of_an_adapter(flags: dict[str, Any], reason: str) -> None:
    """Raises RecipeError if one of `flags` is given."""
    given = next((flag for flag, value in flags.items() if value), None)
    if given:
        raise RecipeError(f"{given}: is of an adapter, and {reason}")


def requested_active(text: str | None, config: AdapterConfig, sampled: bool) -> list[int | None]:
    """`1,2,4` as numbers; [None] for the trained k. Raises RecipeError, also for what needs a router without one."""
    if (text is not None and not config.routed) or (sampled and not config.samples):
        raise RecipeError(
            f"--selection sample and --active are for adapters that choose k of n LoRAs; this is {config.method}, "
            f"{config.active} of {config.pool_size}"
        )
    pool_size = config.pool_size
    if text is None:
        return [None]
    try:
        many: list[int | None] = [int(part) for part in text.split(",")]
    except ValueError:
        many = [0]
    if not all(k is not None and 1 <= k <= pool_size for k in many):
        raise RecipeError(f"--active: {text!r}: give numbers between 1 and {pool_size}, for example 1,2,4")
    return many


def override_source(recipe: Recipe, task: Task, path: str | None) -> Task:
    """The task on another file: in the task's own format, or for `nll` in that of the recipe's first source."""
    if path is None:
        return task
    default = recipe.data.train[0] if task_class(task.task).any_rows else Source(path=path, **_row_format(task))
    return task.model_copy(update={"source": (task.source or default).at(path)})


def _row_format(task: Task) -> dict[str, Any]:
    row_format = task_class(task.task).row_format
    return {} if row_format is None else {"format": row_format}


def all_bring_rows(names: list[str]) -> bool:
    """Do the tasks of these names need no file? Not so for a name that is none."""
    return all(name in TASKS and task_class(name).brings_rows for name in names)
