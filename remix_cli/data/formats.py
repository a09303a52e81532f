"""One row of data as a conversation: messages with roles, the assistant's turns being what is learnt."""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remix_cli.errors import shortened

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source  # which checks tasks, which read these rows

Row = dict[str, Any]
Message = dict[str, str]
CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations for an external calculator
MAX_TEXT = 50_000_000  # of one prompt: a template may name a long column many times
ROLES = ("system", "user", "assistant", "tool")


class RowError(ValueError):
    """What is wrong with one row, without its number."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an assistant's turn."""

    messages: tuple[Message, ...]
    task: str


def to_example(row: Row, source: "Source") -> Example:
    """Raises RowError for a missing column, a value of another type or a blank answer."""
    messages = FORMATS[source.format](row, source)
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not message["content"].strip():
            which = f" (message {number})" if number < len(messages) else ""
            raise RowError(f"the answer is blank{which}")
    return Example(tuple(messages), source.label)


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise RowError(f"no column {column!r}; the row has {shortened(', '.join(map(str, row))) or 'none'}")
    return row[column]


def _text(row: Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise RowError(f"column {column!r} should be text, is {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"column {column!r} holds a lone surrogate, which is no character") from None
    return value


def _turns(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _fill(template: str, row: Row) -> str:
    columns = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    texts = {name: _text(row, name) for name in columns}
    if sum(len(texts[name]) for name in columns) > MAX_TEXT:
        raise RowError(f"its text would have more than {MAX_TEXT:,} characters")
    return template.format(**texts)


def _prompt_completion(row: Row, source: "Source") -> list[Message]:
    return _turns(_fill(source.prompt, row), _fill(source.completion, row))


def _messages(row: Row, source: "Source") -> list[Message]:
    messages = _value(row, "messages")
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
            _text(message, "content")
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


def _gsm8k(row: Row, source: "Source") -> list[Message]:
    return _turns(_text(row, "question"), CALCULATOR.sub("", _text(row, "answer")))


def arc_options(row: Row) -> tuple[list[str], list[str]]:
    """Labels and texts of an ARC question's options. Raises RowError."""
    choices = _value(row, "choices")
    if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
        raise RowError("column 'choices' should hold lists 'text' and 'label'")
    labels, texts = choices["label"], choices["text"]
    if not isinstance(labels, list) or not isinstance(texts, list):
        raise RowError("column 'choices' should hold lists 'text' and 'label'")
    if len(labels) != len(texts) or not all(isinstance(x, str) and x for x in (*labels, *texts)):
        raise RowError("column 'choices' should hold equally many labels and texts, none empty")
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise RowError(f"column 'choices' should hold two options or more, each with its own label, has {labels}")
    return labels, texts


def _arc(row: Row, source: "Source") -> list[Message]:
    question, answer = _text(row, "question"), _text(row, "answerKey")
    labels, texts = arc_options(row)
    if answer not in labels:
        raise RowError(f"answerKey {answer!r} is not among the labels {labels}")
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    return _turns(f"{question}\n{options}\nAnswer with the letter of the right option.", answer)


def _codealpaca(row: Row, source: "Source") -> list[Message]:
    instruction = _text(row, "instruction")
    extra = _text(row, "input") if row.get("input") is not None else ""
    return _turns(f"{instruction}\n\n{extra}" if extra else instruction, _text(row, "output"))


FORMATS: "dict[str, Callable[[Row, Source], list[Message]]]" = {
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "gsm8k": _gsm8k,
    "arc": _arc,
    "codealpaca": _codealpaca,
}
