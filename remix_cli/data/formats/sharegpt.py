"""ShareGPT: `conversations`, a list of {from, value}; `from` is human, gpt, system or a name that means the same."""

from typing import TYPE_CHECKING, Any

from remix_cli.data.formats.base import ANSWER, Conversation, Row, RowError, value_of
from remix_cli.data.formats.messages import conversation, ended

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def read(row: Row, source: "Source") -> Conversation:
    said = value_of(row, "conversations")
    if not isinstance(said, list):
        raise RowError(f"column 'conversations' should be a list of {{from, value}}, is {type(said).__name__}")
    messages = [_message(number, turn) for number, turn in enumerate(said, start=1)]
    return conversation(row, messages, "conversations")


def with_answer(row: Row, source: "Source") -> Row:
    """An answer to the last turn, where that is not the assistant's."""
    column = source.columns.get("conversations") or "conversations"
    assistants = {name for name, role in ROLES.items() if role == "assistant"}
    return ended(row, column, "from", assistants, {"from": "gpt", "value": ANSWER})


def _message(number: int, turn: Any) -> Any:
    """In the words of `messages`; rows that have those already are left as they are."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise RowError(f"message {number}: 'from' is {turn['from']!r}, should be one of {', '.join(ROLES)}")
    if "value" not in turn:
        raise RowError(f"message {number}: no 'value'")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": role, "content": turn["value"], **others}
