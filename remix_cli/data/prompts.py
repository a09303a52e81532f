"""Prompts to be answered, out of a file: a line each, or rows in a data format, whose own answers are not read."""

import string
from pathlib import Path
from typing import Any

from remix_cli.data.files import rows_in
from remix_cli.data.formats import Example, RowError, to_example
from remix_cli.errors import DataError
from remix_cli.recipe.sources import LOADERS, Source, ending_of

ANSWER = "."  # in the place of one that is not there
TOLD_BY = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca", "prompt": "prompt_completion"}
ANSWERED_IN = {"alpaca": "output", "codealpaca": "output", "gsm8k": "answer"}
TURNS = {
    "messages": ("messages", "role", "assistant", "content"),
    "sharegpt": ("conversations", "from", "gpt", "value"),
}


def question(text: str) -> Example:
    """A user's turn, to be answered."""
    return Example(({"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}), "question")


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


def _prompt(row: dict[str, Any], like: Source) -> Example:
    told = next((name for column, name in TOLD_BY.items() if column in row), like.format)
    source = like if told == like.format else Source(path=like.path, format=told)
    return to_example(_answered(row, source), source)


def _answered(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """With an answer where the row has none."""
    if source.format == "prompt_completion":
        columns = [name for _, name, _, _ in string.Formatter().parse(source.completion) if name]
        return dict.fromkeys(columns, ANSWER) | row
    if source.format in ANSWERED_IN:
        return {ANSWERED_IN[source.format]: ANSWER} | row
    if source.format in TURNS:
        column, who, assistant, said = TURNS[source.format]
        turns = row.get(column)
        if (
            isinstance(turns, list)
            and turns
            and isinstance(turns[-1], dict)
            and turns[-1].get(who) in ("user", "human")
        ):
            return row | {column: [*turns, {who: assistant, said: ANSWER}]}
    return row
