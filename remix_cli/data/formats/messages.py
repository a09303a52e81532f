"""Conversations as chats have them: a list of {role, content}. What would not be seen is refused."""

from typing import TYPE_CHECKING, Any

from remix_cli.data.formats.base import Message, Row, RowError, text_of, value_of

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source

ROLES = ("system", "user", "assistant", "tool")


def read(row: Row, source: "Source") -> list[Message]:
    messages = value_of(row, "messages")
    if not isinstance(messages, list) or not messages:
        raise RowError(f"column 'messages' should be a list of {{role, content}}, is {_kind(messages)}")
    for column in ALSO_RENDERED:
        if _says_something(row.get(column)):
            raise RowError(f"column {column!r} is not read, so the model would not see it; {ALSO_RENDERED[column]}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RowError(f"message {number}: the role should be one of {', '.join(ROLES)}")
        for key, value in message.items():
            if key not in ("role", "content") and _says_something(value):
                raise RowError(f"message {number}: {key!r} is not read, only role and content; {_instead(key)}")
        try:
            text_of(message, "content")
        except RowError as error:
            raise RowError(f"message {number}: {error}") from None
    if messages[0]["role"] == "assistant":
        raise RowError("the first message should not be the assistant's")
    if messages[-1]["role"] != "assistant":
        raise RowError("the last message should be the assistant's")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


# Columns that chat templates render beside the messages, and what to do with them instead.
ALSO_RENDERED = {
    "tools": "write the tools into a system message, or take the row out",
    "functions": "write the functions into a system message, or take the row out",
    "documents": "write the documents into a message, or take the row out",
    "system": "make it the first message, with the role system",
    "chat_template_kwargs": "write what they set into the chat template, or take the row out",
}


def _says_something(value: Any) -> bool:
    """Tables fill in None, or an empty list, where a row has no such key."""
    return value is not None and value not in ("", [], {})


def _instead(key: str) -> str:
    if key in ("tool_calls", "function_call"):
        return "write the call into content as the model is to write it, or take the row out"
    return "write it into content, or take it out"


def _kind(value: Any) -> str:
    return "empty" if value == [] else "null" if value is None else type(value).__name__
