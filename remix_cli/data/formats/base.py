"""A conversation: messages with roles, the assistant's turns being what is learnt. And what formats have in common."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remix_cli.data.formats.registry import reader_of
from remix_cli.errors import shortened

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source  # which checks tasks, which read these rows

Row = dict[str, Any]
Message = dict[str, str]


class RowError(ValueError):
    """What is wrong with one row, without its number."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an assistant's turn."""

    messages: tuple[Message, ...]
    task: str


def to_example(row: Row, source: "Source") -> Example:
    """Raises RowError for a missing column, a value of another type or a blank answer."""
    messages = reader_of(source.format)(row, source)
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not message["content"].strip():
            which = f" (message {number})" if number < len(messages) else ""
            raise RowError(f"the answer is blank{which}")
    return Example(tuple(messages), source.label)


def value_of(row: Row, column: str) -> Any:
    """Raises RowError if there is no such column."""
    if column not in row:
        raise RowError(f"no column {column!r}; the row has {shortened(', '.join(map(str, row))) or 'none'}")
    return row[column]


def text_of(row: Row, column: str) -> str:
    """Raises RowError if the column is absent or no text."""
    value = value_of(row, column)
    if not isinstance(value, str):
        raise RowError(f"column {column!r} should be text, is {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"column {column!r} holds a lone surrogate, which is no character") from None
    return value


def turns(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
