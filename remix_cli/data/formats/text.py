"""Plain `text`: all of it is learnt, as it stands, whatever the chat template (continued pretraining)."""

from typing import TYPE_CHECKING

from remix_cli.data.formats.base import Message, Row, text_of

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source


def read(row: Row, source: "Source") -> list[Message]:
    return [{"role": "text", "content": text_of(row, "text")}]
