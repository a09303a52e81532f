"""A conversation: messages with roles, the assistant's turns being what is learnt. And what formats have in common."""

import json
import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from remix_cli.data.formats.registry import DEFAULT, formats_told_by, reader_of
from remix_cli.errors import shortened

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source  # which checks tasks, which read these rows

Row = dict[str, Any]
# `role` and `content`; of an assistant's turn perhaps `reasoning_content`, `tool_calls`, and `learnt: False` if it is
# only read. The role `text` is of plain text, which is learnt as it stands.
Message = dict[str, Any]


ANSWER = "."  # in the place of an answer that is still to come
LONGEST_NAME = 80  # characters of a task's name: a column of longer texts is hardly one


class RowError(ValueError):
    """What is wrong with one row, without its number."""


class MissingColumn(RowError):
    """A column that the format reads is not there."""

    def __init__(self, column: str, row: Row):
        super().__init__(f"no column {column!r}; the row has {shortened(', '.join(map(str, row))) or 'none'}")
        self.column = column


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
    column: str | None = field(default=None, compare=False)  # that holds all its messages, where one does


class Conversation(NamedTuple):
    """What a format may give instead of messages alone."""

    messages: list[Message]
    tools: list[dict[str, Any]]


def to_example(row: Row, source: "Source", origin: Origin | None = None) -> Example:
    """Raises RowError for a missing column, a value of another type or a blank answer."""
    try:
        read = reader_of(source.format)(_with_names(row, source.columns), source)
    except MissingColumn as error:
        raise RowError(f"{error}; {_remedy(error.column, row, source)}") from None
    except RowError as error:
        raise RowError(in_column(column_of_messages(source), str(error))) from None
    messages, tools = read if isinstance(read, Conversation) else Conversation(read, [])
    for number, message in enumerate(messages, start=1):
        if message["role"] in ("assistant", "text") and not message["content"].strip() and "tool_calls" not in message:
            which = f" (message {number})" if number < len(messages) else ""
            where = f"column {source.answered_in}: " if source.answered_in else ""
            raise RowError(f"{where}the answer is blank{which}; write one, or take the row out")
    if source.system is not None and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": source.system}, *messages]
    if source.learn == "last":
        messages = [*(_only_read(message) for message in messages[:-1]), messages[-1]]
    task, weight = _task_of(row, source), _weight_of(row, source)
    return Example(tuple(messages), task, tuple(tools), weight, origin, column_of_messages(source))


IN_ONE_COLUMN = {"messages": "messages", "sharegpt": "conversations"}  # by format, the column of whole conversations


def column_of_messages(source: "Source") -> str | None:
    """As the file calls it; None for formats that make a conversation of several columns."""
    name = IN_ONE_COLUMN.get(source.format)
    return name and (source.columns.get(name) or name)


def in_column(column: str | None, problem: str) -> str:
    """The problem with the column that the message it speaks of stands in, if it does not name it itself."""
    if column is None or "message " not in problem or f"column {column!r}" in problem:
        return problem
    return f"column {column!r}: {problem}"


def _with_names(row: Row, columns: dict[str, str | None]) -> Row:
    """With the names that the format reads. Raises RowError."""
    named = {name: value_of(row, own) for name, own in columns.items() if own is not None}
    return row | named if named else row


def _remedy(column: str, row: Row, source: "Source") -> str:
    """What to set where a column is not there."""
    others = [name for name in formats_told_by(set(map(str, row))) if name != source.format]
    if others:
        return f"set format: {' or '.join(others)}"
    if column in source.columns.values():
        return "name one that is there in columns"
    if source.format == DEFAULT:
        return 'name those that are there: prompt: "{...}" and completion: "{...}"'
    return f"say which one it is: columns: {{{column}: ...}}"


def _task_of(row: Row, source: "Source") -> str:
    """Of the row's own column, else of the source. Raises RowError."""
    value = _of_any_row("task", row, source)
    if value is None:
        return source.label
    name = text_of({"task": value}, "task").strip()
    if len(name) > LONGEST_NAME:
        raise RowError(
            f"column {_column('task', source)!r} should be a task's name, and has {len(name)} characters; if it is "
            "something else, set columns: {task: null}"
        )
    return sys.intern(name) or source.label


def _weight_of(row: Row, source: "Source") -> float:
    """Of the row's own column, else 1. Raises RowError."""
    value = _of_any_row("weight", row, source)
    if value is None:
        return 1.0
    weight = _number(value)
    if weight is None or weight < 0:
        raise RowError(
            f"column {_column('weight', source)!r} is {shortened(repr(value), 30)}, should be a number that is not "
            "negative; if it is no weight, set columns: {weight: null}"
        )
    return weight


def _number(value: Any) -> float | None:
    """A finite number, also one written as text, as the cells of a csv file are; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _of_any_row(name: str, row: Row, source: "Source") -> Any:
    """What a row says in a column of OF_ANY_ROW; None where the source's templates read it as something else."""
    column = _column(name, source)
    if column is None or (name not in source.columns and column in source.template_columns):
        return None
    value = row.get(column)
    return value if is_given(value) else None


def _column(name: str, source: "Source") -> str | None:
    return source.columns.get(name, name)


def _only_read(message: Message) -> Message:
    return message | {"learnt": False} if message["role"] == "assistant" else message


def without_mark(message: Message) -> Message:
    """As a chat template is to see it: whether it is learnt is no part of what it says."""
    return {key: value for key, value in message.items() if key != "learnt"}


def value_of(row: Row, column: str) -> Any:
    """Raises RowError if there is no such column."""
    if column not in row:
        raise MissingColumn(column, row)
    return row[column]


def text_of(row: Row, column: str) -> str:
    """Numbers, true and false as JSON writes them. Raises RowError if the column is absent or cannot be text."""
    value = value_of(row, column)
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise RowError(f"column {column!r} should be text, is {kind}; name another column, or take the row out")
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


def question(text: str) -> Example:
    """A user's turn, to be answered."""
    return Example(tuple(turns(text, ANSWER)), "question")


def turns(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
