"""Two templates over a row's columns."""

import string
from typing import TYPE_CHECKING

from remix_cli.data.formats.base import Message, Row, RowError, text_of, turns

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source

MAX_TEXT = 50_000_000  # of one prompt: a template may name a long column many times


def read(row: Row, source: "Source") -> list[Message]:
    return turns(fill(source.prompt, row), fill(source.completion, row))


def fill(template: str, row: Row) -> str:
    columns = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    texts = {name: text_of(row, name) for name in columns}
    if sum(len(texts[name]) for name in columns) > MAX_TEXT:
        raise RowError(f"its text would have more than {MAX_TEXT:,} characters")
    return template.format(**texts)
