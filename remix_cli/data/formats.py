"""One row of data as a conversation: messages with roles, the assistant's turns being what is learnt."""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remix_cli.recipe.schema import Source

Row = dict[str, Any]
Message = dict[str, str]
CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations for an external calculator
ROLES = ("system", "user", "assistant", "tool")


class RowError(ValueError):
    """What is wrong with one row, without its number."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an assistant's turn."""

    messages: tuple[Message, ...]
    task: str


def to_example(row: Row, source: Source) -> Example:
    """Raises RowError for a missing column, a value of another type or a blank answer."""
    messages = FORMATS[source.format](row, source)
    if not messages[-1]["content"].strip():
        raise RowError("the answer is blank")
    return Example(tuple(messages), source.label)


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise RowError(f"no column {column!r}; the row has {', '.join(map(str, row)) or 'none'}")
    value = row[column]
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
    return template.format(**{name: _text(row, name) for name in columns})


def _prompt_completion(row: Row, source: Source) -> list[Message]:
    return _turns(_fill(source.prompt, row), _fill(source.completion, row))


def _messages(row: Row, source: Source) -> list[Message]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("column 'messages' should be a list of {role, content}")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RowError(f"a message's role should be one of {', '.join(ROLES)}")
        _text(message, "content")
    if messages[0]["role"] == "assistant":
        raise RowError("the first message should not be the assistant's")
    if messages[-1]["role"] != "assistant":
        raise RowError("the last message should be the assistant's")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _gsm8k(row: Row, source: Source) -> list[Message]:
    return _turns(_text(row, "question"), CALCULATOR.sub("", _text(row, "answer")))


def arc_options(row: Row) -> tuple[list[str], list[str]]:
    """Labels and texts of an ARC question's options. Raises RowError."""
    choices = row.get("choices")
    if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
        raise RowError("column 'choices' should hold lists 'text' and 'label'")
    labels, texts = choices["label"], choices["text"]
    if len(labels) != len(texts) or not all(isinstance(x, str) and x for x in (*labels, *texts)):
        raise RowError("column 'choices' should hold equally many labels and texts, none empty")
    return labels, texts


def _arc(row: Row, source: Source) -> list[Message]:
    question, answer = _text(row, "question"), _text(row, "answerKey")
    labels, texts = arc_options(row)
    if answer not in labels:
        raise RowError(f"answerKey {answer!r} is not among the labels {labels}")
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    return _turns(f"{question}\n{options}\nAnswer with the letter of the right option.", answer)


def _codealpaca(row: Row, source: Source) -> list[Message]:
    instruction, extra = _text(row, "instruction"), row.get("input") or ""
    return _turns(f"{instruction}\n\n{extra}" if extra else instruction, _text(row, "output"))


FORMATS: dict[str, Callable[[Row, Source], list[Message]]] = {
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "gsm8k": _gsm8k,
    "arc": _arc,
    "codealpaca": _codealpaca,
}
