"""The format of a source that names none: its first rows' columns tell it, or the user is asked. And their day."""

import itertools
from typing import NamedTuple

from pydantic import ValidationError

from remix_cli.data.formats.registry import FORMATS, OF_ANY_ROW, PROVENANCE, formats_told_by
from remix_cli.data.sources import check_source, iterate_rows
from remix_cli.data.template import day_for
from remix_cli.errors import DataError, shortened
from remix_cli.models import load_tokenizer
from remix_cli.recipe import Recipe
from remix_cli.recipe.sources import Source
from remix_cli.tasks.registry import task_class

FIRST = 20  # rows that are looked at


class Told(NamedTuple):
    """A recipe that says every format, and which of them its rows' columns told: a line each."""

    recipe: Recipe
    lines: list[str]


def tell_formats(recipe: Recipe) -> Told:
    """Raises DataError where the columns of a source fit no format, or several.

    Sources that `check_source` finds fault with stay as they are, and so do those of tasks with columns of their own
    and those of tasks that lie on the hub, which need not be fetched yet.
    """
    lines: list[str] = []
    rows = {}
    for part in ("train", "validation"):
        sources = getattr(recipe.data, part)
        rows[part] = [_told(source, f"data.{part}.{i}", lines) for i, source in enumerate(sources)]
    tasks = []
    for i, task in enumerate(recipe.eval.tasks):
        source = task.source
        if source is not None and source.is_local and not task_class(task.task).own_columns:
            task = task.model_copy(update={"source": _told(source, f"eval.tasks.{i}.source", lines)})
        tasks.append(task)
    data = recipe.data.model_copy(update=rows)
    asked = recipe.eval.model_copy(update={"tasks": tasks})
    return Told(recipe.model_copy(update={"data": data, "eval": asked}), lines)


def day_of(recipe: Recipe) -> str | None:
    """Today, where the recipe's chat template writes the date into its rows. Raises RecipeError."""
    return day_for(load_tokenizer(recipe.model), recipe.data)


def _told(source: Source, key: str, lines: list[str]) -> Source:
    if source.says_format or check_source(source, key):
        return source
    columns = _columns(source)
    told = formats_told_by({*columns, *source.columns})
    shown = shortened(", ".join(columns))
    if len(told) != 1:
        raise DataError(f"{key}.format: {source.named} has the columns {shown}, {_ask(told, columns)}")
    lines.append(f"{source.place}: format {told[0]}, told by the columns {shown}")
    try:
        return Source.model_validate(source.model_dump(exclude_unset=True) | {"format": told[0]})
    except ValidationError as error:  # what this format does not read
        problem = error.errors()[0]
        below = problem.get("ctx", {}).get("below", ())
        place = ".".join(map(str, (key, *problem["loc"], *below)))
        raise DataError(f"{place}: {problem['msg'].removeprefix('Value error, ')} (format {told[0]})") from None


def _columns(source: Source) -> list[str]:
    """Those that say something in the first rows, in order."""
    found: dict[str, None] = {}
    for row, _ in itertools.islice(iterate_rows(source), FIRST):
        for name, value in row.items():
            if value is not None:
                found[str(name)] = None
    return list(found)


def _ask(told: list[str], columns: list[str]) -> str:
    if told:
        return f"which fit several formats; set format: {' or '.join(told)}"
    said = [name for name in columns if name not in (*OF_ANY_ROW, *PROVENANCE)] or ["..."]
    example = f'prompt: "{{{said[0]}}}" and completion: "{{{said[-1]}}}"'
    return f"which tell no format; set {example}, with the columns that are meant, or format: {' or '.join(FORMATS)}"
