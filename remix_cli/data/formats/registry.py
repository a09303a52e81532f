"""The formats by name: where each is read, and which keys of a source it reads besides the rows."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FormatFacts:
    where: str  # module:function, from a row and its source to messages
    reads: tuple[str, ...] = ()


FORMATS = {
    "prompt_completion": FormatFacts("remix_cli.data.formats.prompt_completion:read", ("prompt", "completion")),
    "messages": FormatFacts("remix_cli.data.formats.messages:read"),
    "sharegpt": FormatFacts("remix_cli.data.formats.sharegpt:read"),
    "alpaca": FormatFacts("remix_cli.data.formats.alpaca:read"),
    "text": FormatFacts("remix_cli.data.formats.text:read"),
    "gsm8k": FormatFacts("remix_cli.data.formats.gsm8k:read"),
    "arc": FormatFacts("remix_cli.data.formats.arc:read"),
    "codealpaca": FormatFacts("remix_cli.data.formats.alpaca:read"),
}


def reader_of(name: str) -> Callable[..., Any]:
    """Raises KeyError for a name that is not in `FORMATS`."""
    return pkgutil.resolve_name(FORMATS[name].where)
