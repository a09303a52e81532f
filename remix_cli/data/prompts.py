"""Prompts to be answered, out of a file: a line each, or rows in a data format, whose own answers are not read."""

import pkgutil
from pathlib import Path

from remix_cli.data.files import rows_in
from remix_cli.data.formats import ANSWER, Example, Row, RowError, question, to_example
from remix_cli.data.formats.registry import FORMATS, formats_asked_by
from remix_cli.errors import DataError
from remix_cli.recipe.sources import LOADERS, Source, ending_of


def prompts_in(path: Path, like: Source) -> list[Example]:
    """A conversation for each row, with its own last answer or none; rows are read as those of `like`, where no column
    tells another format. Raises DataError with the row, also for a file without any."""
    if not path.is_file():
        raise DataError(f"{path}: no such file of prompts")
    ending = ending_of(str(path))
    if ending not in LOADERS:
        raise DataError(f"{path}: a file of prompts ends in {', '.join(LOADERS)}, perhaps with .gz")
    separator = like.separator if LOADERS[ending] == "csv" else None
    found = []
    for number, row in enumerate(rows_in(path, separator), start=1):
        try:
            if LOADERS[ending] != "text":
                found.append(_prompt(row, like))
            elif row["text"].strip():
                found.append(question(row["text"].strip()))
        except RowError as error:
            raise DataError(f"{path}: row {number}: {error}") from None
    if not found:
        raise DataError(f"{path}: holds no prompt; give one a line, or rows in one of the data formats")
    return found


def _prompt(row: Row, like: Source) -> Example:
    told = formats_asked_by(set(row))
    source = like if not told or like.format in told else Source(path=like.path, format=told[0])
    return to_example(_answered(row, source), source)


def _answered(row: Row, source: Source) -> Row:
    """With an answer where the row has none."""
    facts = FORMATS[source.format]
    if facts.completes:
        return pkgutil.resolve_name(facts.completes)(row, source)
    return {source.columns.get(facts.answer) or facts.answer: ANSWER} | row
