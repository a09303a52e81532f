"""CodeAlpaca: `instruction`, perhaps `input`, and `output`."""

from typing import TYPE_CHECKING

from remix_cli.data.formats.base import Message, Row, text_of, turns

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source


def read(row: Row, source: "Source") -> list[Message]:
    instruction = text_of(row, "instruction")
    extra = text_of(row, "input") if row.get("input") is not None else ""
    return turns(f"{instruction}\n\n{extra}" if extra else instruction, text_of(row, "output"))
