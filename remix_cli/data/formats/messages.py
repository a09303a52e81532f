"""Conversations as chats have them: a list of {role, content}. What would not be seen is refused.

An assistant's message may also hold `tool_calls` and `reasoning_content` (or `thinking`), and `weight: 0` where it is
only read. A row may have `tools`, which the chat template shows to the model.
"""

from typing import TYPE_CHECKING, Any

from remix_cli.data.formats.base import (
    ANSWER,
    Conversation,
    Message,
    Row,
    RowError,
    from_json,
    is_given,
    text_of,
    tools_of,
    value_of,
)

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source

ROLES = ("system", "developer", "user", "assistant", "tool")
THINKING = ("reasoning_content", "thinking", "reasoning")
# Keys of a message that say how it came about, and nothing that a model is to read.
PROVENANCE = ("id", "timestamp")
# By role, what is read besides role and content.
ALSO = {"assistant": ("tool_calls", "weight", *THINKING), "tool": ("tool_call_id", "name")}


def read(row: Row, source: "Source") -> Conversation:
    messages = value_of(row, "messages")
    if not isinstance(messages, list) or not messages:
        raise RowError(f"column 'messages' should be a list of {{role, content}}, is {_kind(messages)}")
    return conversation(row, messages, "messages")


def with_answer(row: Row, source: "Source") -> Row:
    """An answer to the last turn, where that is not the assistant's."""
    column = source.columns.get("messages") or "messages"
    return ended(row, column, "role", {"assistant"}, {"role": "assistant", "content": ANSWER})


def ended(row: Row, column: str, who: str, assistants: set[str], answer: dict[str, str]) -> Row:
    """The list in `column` with `answer` behind a last turn whose `who` is none of `assistants`."""
    said = row.get(column)
    if not isinstance(said, list) or not said or not isinstance(said[-1], dict) or said[-1].get(who) in assistants:
        return row
    return row | {column: [*said, answer]}


def conversation(row: Row, messages: list[Any], column: str) -> Conversation:
    """The messages of `column`, checked, up to the assistant's last turn: what follows it, nobody answers.

    Raises RowError for whatever of the row would not be seen.
    """
    for other in ALSO_RENDERED:
        if is_given(row.get(other)):
            raise RowError(f"column {other!r} is not read, so the model would not see it; {ALSO_RENDERED[other]}")
    checked = [_checked(number, message) for number, message in enumerate(messages, start=1)]
    answers = [number for number, message in enumerate(checked, start=1) if message["role"] == "assistant"]
    if not answers:
        raise RowError(f"column {column!r} holds no message of the assistant's, so there is nothing to learn")
    if not any(checked[number - 1].get("learnt", True) for number in answers):
        raise RowError("every message of the assistant's has weight 0, so there is nothing to learn")
    if checked[0]["role"] == "assistant":
        raise RowError("the first message should not be the assistant's")
    return Conversation(checked[: answers[-1]], tools_of(row))


# Columns that chat templates render beside the messages, and what to do with them instead.
ALSO_RENDERED = {
    "functions": "write them into the column 'tools', or take the row out",
    "documents": "write the documents into a message, or take the row out",
    "system": "make it the first message, with the role system",
    "chat_template_kwargs": "set data.chat_template_kwargs for all rows, or take the row out",
}


def _checked(number: int, message: Any) -> Message:
    """One message with the keys that a template reads. Raises RowError, naming the message."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RowError(f"message {number}: the role should be one of {', '.join(ROLES)}")
    role = message["role"]
    also = ALSO.get(role, ())
    for key, value in message.items():
        if key not in ("role", "content", *also, *PROVENANCE) and is_given(value):
            raise RowError(f"message {number}: {key!r} is not read; {_instead(key, role)}")
    try:
        return _read_message(message, role)
    except RowError as error:
        raise RowError(f"message {number}: {error}") from None


def _read_message(message: dict[str, Any], role: str) -> Message:
    """What other roles have, this one's keys no longer hold."""
    read: Message = {"role": role}
    if is_given(message.get("tool_calls")):
        read["tool_calls"] = _calls(message["tool_calls"])
    # a turn that only calls tools need say nothing
    silent = "tool_calls" in read and not is_given(message.get("content"))
    read["content"] = "" if silent else _content(message)
    for key in THINKING:
        if is_given(message.get(key)):
            read["reasoning_content"] = text_of(message, key)
    for key in ("tool_call_id", "name"):
        if is_given(message.get(key)):
            read[key] = text_of(message, key)
    weight = message.get("weight")
    if weight is not None:
        if weight not in (0, 1):
            raise RowError(f"'weight' is {weight!r}; it says whether an assistant's turn is learnt, and is 0 or 1")
        if weight == 0:
            read["learnt"] = False
    return read


def _content(message: dict[str, Any]) -> str:
    """As text; a list of parts, if all of them are text, is their texts one after the other."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return text_of(message, "content")
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RowError(f"content has a part of type {kind!r}, and only text is read; take the row out")
        texts.append(text_of(part, "text"))
    return "".join(texts)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls as templates expect them: {type, id, function: {name, arguments}}, arguments as an object."""
    if not isinstance(calls, list):
        raise RowError(f"'tool_calls' should be a list, is {type(calls).__name__}")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("'tool_calls' should hold {function: {name, arguments}}")
        arguments = from_json(function.get("arguments") or {}, "the arguments of a tool call")
        if not isinstance(arguments, dict):
            raise RowError(f"the arguments of a tool call should be an object, are {type(arguments).__name__}")
        made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if is_given(call.get("id")):
            made["id"] = text_of(call, "id")
        read.append(made)
    return read


def _instead(key: str, role: str) -> str:
    if key == "function_call":
        return "write it as tool_calls, or take the row out"
    owner = next((name for name, keys in ALSO.items() if key in keys), None)
    if owner:
        return f"it belongs to the role {owner}, and this is {role}"
    return "write it into content, or take it out"


def _kind(value: Any) -> str:
    if value == []:
        return "empty"
    return "null" if value is None else type(value).__name__
