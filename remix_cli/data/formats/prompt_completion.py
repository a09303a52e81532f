"""Two templates over a row's columns; or two columns of messages, of which those of the completion are learnt."""

import string
from typing import TYPE_CHECKING, Any

from remix_cli.data.formats.base import ANSWER, Conversation, Message, Row, RowError, text_of, turns, value_of
from remix_cli.data.formats.messages import conversation
from remix_cli.recipe.sources import columns_in

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source

MAX_TEXT = 50_000_000  # of one prompt: a template may name a long column many times


def read(row: Row, source: "Source") -> list[Message] | Conversation:
    chat = _messages_in(source.prompt, row)
    if chat is None:
        return turns(fill(source.prompt, row), fill(source.completion, row))
    answered = _messages_in(source.completion, row)
    if answered is None:
        answered = [{"role": "assistant", "content": fill(source.completion, row)}]
    given = [_only_given(message) for message in chat]
    return conversation(row, [*given, *answered], "completion")


def with_answer(row: Row, source: "Source") -> Row:
    """A text in every column of the completion that the row lacks."""
    return dict.fromkeys(columns_in(source.completion), ANSWER) | row


def _messages_in(template: str, row: Row) -> list[Any] | None:
    """The list that the one column of a template holds; None where the template makes a text."""
    parts = list(string.Formatter().parse(template))
    if len(parts) != 1 or parts[0][0] or not parts[0][1]:
        return None
    value = value_of(row, parts[0][1])
    return value if isinstance(value, list) else None


def _only_given(message: Any) -> Any:
    if isinstance(message, dict) and message.get("role") == "assistant":
        return message | {"weight": 0}
    return message


def fill(template: str, row: Row) -> str:
    columns = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    texts = {name: text_of(row, name) for name in columns}
    if sum(len(texts[name]) for name in columns) > MAX_TEXT:
        raise RowError(f"its text would have more than {MAX_TEXT:,} characters")
    return template.format(**texts)
