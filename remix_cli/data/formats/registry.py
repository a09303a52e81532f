"""The formats by name: where each is read, and which keys of a source it reads besides the rows."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FormatFacts:
    where: str  # module:function, from a row and its source to messages
    reads: tuple[str, ...] = ()
    told_by: tuple[str, ...] = ()  # columns that tell it, where a row does not fit the format it is said to have
    columns: tuple[str, ...] = ()  # that it knows by name; none: those that its templates name, or any


ALPACA = ("instruction", "input", "output", "system", "history")
ARC = ("question", "choices", "answerKey")
FORMATS = {
    "prompt_completion": FormatFacts("remix_cli.data.formats.prompt_completion:read", ("prompt", "completion")),
    "messages": FormatFacts(
        "remix_cli.data.formats.messages:read", told_by=("messages",), columns=("messages", "tools")
    ),
    "sharegpt": FormatFacts(
        "remix_cli.data.formats.sharegpt:read", told_by=("conversations",), columns=("conversations", "tools")
    ),
    "alpaca": FormatFacts("remix_cli.data.formats.alpaca:read", told_by=("instruction", "output"), columns=ALPACA),
    "text": FormatFacts("remix_cli.data.formats.text:read", told_by=("text",), columns=("text",)),
    "gsm8k": FormatFacts("remix_cli.data.formats.gsm8k:read", columns=("question", "answer")),
    "arc": FormatFacts("remix_cli.data.formats.arc:read", told_by=ARC, columns=ARC),
    "codealpaca": FormatFacts("remix_cli.data.formats.alpaca:read", columns=ALPACA),
}


def format_told_by(columns: set[str]) -> str | None:
    """The format that these columns tell, if any does."""
    for name, facts in FORMATS.items():
        if facts.told_by and columns.issuperset(facts.told_by):
            return name
    return None


def reader_of(name: str) -> Callable[..., Any]:
    """Raises KeyError for a name that is not in `FORMATS`."""
    return pkgutil.resolve_name(FORMATS[name].where)
