"""GSM8K: `question` and `answer`, without the annotations for an external calculator."""

import re
from typing import TYPE_CHECKING

from remix_cli.data.formats.base import Message, Row, text_of, turns

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source

CALCULATOR = re.compile(r"<<[^<>]*>>")


def read(row: Row, source: "Source") -> list[Message]:
    return turns(text_of(row, "question"), CALCULATOR.sub("", text_of(row, "answer")))
