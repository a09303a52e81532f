"""A conversation: messages with roles, the assistant's turns being what is learnt. And what formats have in common."""

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from remix_cli.data.formats.registry import format_told_by, reader_of
from remix_cli.errors import shortened

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source  # which checks tasks, which read these rows

Row = dict[str, Any]
# `role` and `content`; of an assistant's turn perhaps `reasoning_content`, `tool_calls`, and `learnt: False` if it is
# only read. The role `text` is of plain text, which is learnt as it stands.
Message = dict[str, Any]


class RowError(ValueError):
    """What is wrong with one row, without its number."""


class MissingColumn(RowError):
    """A column that the format reads is not there."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands: what error messages name."""

    place: str  # a file as the recipe names it, a hub id or a reasoning-gym task; one text for all of its rows
    row: int  # counted from 1

    def __str__(self) -> str:
        return f"{self.place}: row {self.row}"


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with an assistant's turn, or one plain text."""

    messages: tuple[Message, ...]
    task: str
    tools: tuple[dict[str, Any], ...] = ()  # that the model may call
    weight: float = 1.0  # its tokens' losses are multiplied by it; 0: not trained on
    origin: Origin | None = field(default=None, compare=False)


class Conversation(NamedTuple):
    """What a format may give instead of messages alone."""

    messages: list[Message]
    tools: list[dict[str, Any]]


def to_example(row: Row, source: "Source", origin: Origin | None = None) -> Example:
    """Raises RowError for a missing column, a value of another type or a blank answer."""
    try:
        read = reader_of(source.format)(_with_names(row, source.columns), source)
    except MissingColumn as error:
        other = format_told_by(set(map(str, row)))
        if other in (None, source.format):
            raise
        raise RowError(f"{error}; set format: {other}") from None
    messages, tools = read if isinstance(read, Conversation) else Conversation(read, [])
    for number, message in enumerate(messages, start=1):
        if message["role"] in ("assistant", "text") and not message["content"].strip() and "tool_calls" not in message:
            which = f" (message {number})" if number < len(messages) else ""
            raise RowError(f"the answer is blank{which}")
    if source.system is not None and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": source.system}, *messages]
    if source.learn == "last":
        messages = [*(_only_read(message) for message in messages[:-1]), messages[-1]]
    return Example(tuple(messages), source.label, tuple(tools), origin=origin)


def _with_names(row: Row, columns: dict[str, str]) -> Row:
    """With the names that the format reads. Raises RowError."""
    return row | {name: value_of(row, own) for name, own in columns.items()}


def _only_read(message: Message) -> Message:
    return message | {"learnt": False} if message["role"] == "assistant" else message


def without_mark(message: Message) -> Message:
    """As a chat template is to see it: whether it is learnt is no part of what it says."""
    return {key: value for key, value in message.items() if key != "learnt"}


def value_of(row: Row, column: str) -> Any:
    """Raises RowError if there is no such column."""
    if column not in row:
        raise MissingColumn(f"no column {column!r}; the row has {shortened(', '.join(map(str, row))) or 'none'}")
    return row[column]


def text_of(row: Row, column: str) -> str:
    """Numbers, true and false as JSON writes them. Raises RowError if the column is absent or cannot be text."""
    value = value_of(row, column)
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if not isinstance(value, str):
        raise RowError(f"column {column!r} should be text, is {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"column {column!r} holds a lone surrogate, which is no character") from None
    return value


def tools_of(row: Row) -> list[Any]:
    """The column `tools`: a list of functions, or one written as JSON; empty where there is none. Raises RowError."""
    tools = row.get("tools")
    if not is_given(tools):
        return []
    tools = from_json(tools, "column 'tools'")
    if not isinstance(tools, list) or not all(map(_is_function, tools)):
        raise RowError("column 'tools' should be a list of functions, each {type: function, function: {name, ...}}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _is_function(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def from_json(value: Any, what: str) -> Any:
    """Tables without nested types keep such values as JSON text. Raises RowError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(f"{what} should be JSON, is {shortened(value, 60)!r}") from None


def is_given(value: Any) -> bool:
    """Tables fill in None, or an empty text or list, where a row has no such key."""
    return value is not None and value not in ("", [], {})


def turns(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
