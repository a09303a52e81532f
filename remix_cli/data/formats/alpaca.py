"""Alpaca: `instruction`, perhaps `input`, and `output`; perhaps `system`, and `history` as pairs of earlier turns."""

from typing import TYPE_CHECKING

from remix_cli.data.formats.base import Message, Row, RowError, is_given, text_of, turns

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source


def read(row: Row, source: "Source") -> list[Message]:
    messages: list[Message] = []
    if is_given(row.get("system")):
        messages.append({"role": "system", "content": text_of(row, "system")})
    messages += _history(row)
    instruction = text_of(row, "instruction")
    if is_given(row.get("input")):
        instruction = f"{instruction}\n\n{text_of(row, 'input')}"
    return messages + turns(instruction, text_of(row, "output"))


def _history(row: Row) -> list[Message]:
    """Earlier turns, [instruction, answer] each; learnt like the last one."""
    history = row.get("history")
    if not is_given(history):
        return []
    messages: list[Message] = []
    pairs = history if isinstance(history, list) else [history]
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"column 'history': entry {number} should be a list of an instruction and its answer")
        asked, answered = pair
        messages += turns(text_of({"history": asked}, "history"), text_of({"history": answered}, "history"))
    return messages
