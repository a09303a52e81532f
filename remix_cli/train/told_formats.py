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
    """A recipe that says every format, and which of them its rows' columns told: a line for all of one kind."""

    recipe: Recipe
    lines: list[str]


class _Of(NamedTuple):
    """What told the format of a source."""

    place: str
    format: str
    columns: str


def tell_formats(recipe: Recipe) -> Told:
    """Raises DataError where the columns of a source fit no format, or several.

    Sources that `check_source` finds fault with stay as they are, and so do those of tasks with columns of their own
    and those of tasks that lie on the hub, which need not be fetched yet.
    """
    found: list[_Of] = []
    rows = {}
    for part in ("train", "validation"):
        sources = getattr(recipe.data, part)
        rows[part] = [_told(source, f"data.{part}.{i}", found) for i, source in enumerate(sources)]
    tasks = []
    for i, task in enumerate(recipe.eval.tasks):
        source = task.source
        if source is not None and source.is_local and not task_class(task.task).own_columns:
            task = task.model_copy(update={"source": _told(source, f"eval.tasks.{i}.source", found)})
        tasks.append(task)
    data = recipe.data.model_copy(update=rows)
    asked = recipe.eval.model_copy(update={"tasks": tasks})
    return Told(recipe.model_copy(update={"data": data, "eval": asked}), _in_lines(found))


def day_of(recipe: Recipe) -> str | None:
    """Today, where the recipe's chat template writes the date into its rows. Raises RecipeError."""
    return day_for(load_tokenizer(recipe.model), recipe.data)


def _in_lines(found: list[_Of]) -> list[str]:
    """Sources alike share a line, in the order of the first of each kind."""
    kinds: dict[tuple[str, str], dict[str, None]] = {}
    for place, name, columns in found:
        kinds.setdefault((name, columns), {})[place] = None
    lines = []
    for (name, columns), places in kinds.items():
        lines.append(f"{_places(list(places))}: format {name}, told by the columns {columns}")
    return lines


def _places(places: list[str]) -> str:
    if len(places) <= 2:
        return " and ".join(places)
    return f"{places[0]} and {len(places) - 1} more files"


def _told(source: Source, key: str, found: list[_Of]) -> Source:
    if source.says_format or check_source(source, key):
        return source
    columns = _columns(source)
    told = formats_told_by({*columns, *source.columns})
    shown = shortened(", ".join(columns))
    if len(told) != 1:
        raise DataError(f"{key}.format: {source.named} has the columns {shown}, {_ask(told, columns)}")
    found.append(_Of(source.place, told[0], shown))
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
