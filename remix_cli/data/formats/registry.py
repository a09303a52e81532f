"""The formats by name: where each is read, and which keys of a source it reads besides the rows."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FormatFacts:
    where: str  # module:function, from a row and its source to messages
    reads: tuple[str, ...] = ()
    told_by: tuple[str, ...] = ()  # columns that tell it
    alone: bool = False  # do they tell it only where no other column says something?
    columns: tuple[str, ...] = ()  # that it knows by name; none: those that its templates name, or any
    answer: str = ""  # the one of them that holds the answer
    completes: str = ""  # module:function, gives a row an answer where it has none; without it, `answer` gets a text


DEFAULT = "prompt_completion"
ALPACA = ("instruction", "input", "output", "system", "history")
ARC = ("question", "choices", "answerKey")
GSM8K = ("question", "answer")
FORMATS = {
    "prompt_completion": FormatFacts(
        "remix_cli.data.formats.prompt_completion:read",
        ("prompt", "completion"),
        told_by=("prompt", "completion"),
        answer="completion",
        completes="remix_cli.data.formats.prompt_completion:with_answer",
    ),
    "messages": FormatFacts(
        "remix_cli.data.formats.messages:read",
        told_by=("messages",),
        columns=("messages", "tools"),
        answer="messages",
        completes="remix_cli.data.formats.messages:with_answer",
    ),
    "sharegpt": FormatFacts(
        "remix_cli.data.formats.sharegpt:read",
        told_by=("conversations",),
        columns=("conversations", "tools"),
        answer="conversations",
        completes="remix_cli.data.formats.sharegpt:with_answer",
    ),
    "alpaca": FormatFacts(
        "remix_cli.data.formats.alpaca:read", told_by=("instruction", "output"), columns=ALPACA, answer="output"
    ),
    "text": FormatFacts(
        "remix_cli.data.formats.text:read", told_by=("text",), alone=True, columns=("text",), answer="text"
    ),
    "gsm8k": FormatFacts(
        "remix_cli.data.formats.gsm8k:read", told_by=GSM8K, alone=True, columns=GSM8K, answer="answer"
    ),
    "arc": FormatFacts("remix_cli.data.formats.arc:read", told_by=ARC, columns=ARC, answer="answerKey"),
    "codealpaca": FormatFacts("remix_cli.data.formats.alpaca:read", columns=ALPACA, answer="output"),
}
OF_ANY_ROW = ("task", "weight")  # columns that say something about a row, whatever its format
# Columns that say where a row is from, and nothing that a model is to read.
PROVENANCE = ("id", "idx", "source", "url", "date", "timestamp", "meta", "metadata")


def formats_told_by(columns: set[str]) -> list[str]:
    """The formats that these columns tell. Rows with a prompt and a completion are just that, whatever else they have:
    so they were read before formats were told."""
    if columns.issuperset(FORMATS[DEFAULT].told_by):
        return [DEFAULT]
    told = []
    for name, facts in FORMATS.items():
        others = columns.difference(facts.told_by, OF_ANY_ROW, PROVENANCE)
        if facts.told_by and columns.issuperset(facts.told_by) and not (facts.alone and others):
            told.append(name)
    return told


def formats_asked_by(columns: set[str]) -> list[str]:
    """The formats that these columns of a row tell even if it has no answer."""
    asked = []
    for name, facts in FORMATS.items():
        needed = [column for column in facts.told_by if column != facts.answer] or facts.told_by
        if facts.told_by and columns.issuperset(needed) and not facts.alone:
            asked.append(name)
    return asked


def reader_of(name: str) -> Callable[..., Any]:
    """Raises KeyError for a name that is not in `FORMATS`."""
    return pkgutil.resolve_name(FORMATS[name].where)
