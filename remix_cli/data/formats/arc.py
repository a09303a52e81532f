"""ARC: a question with lettered options; the answer is the letter."""

from typing import TYPE_CHECKING

from remix_cli.data.formats.base import Message, Row, RowError, text_of, turns, value_of

if TYPE_CHECKING:
    from remix_cli.recipe.sources import Source


def arc_options(row: Row) -> tuple[list[str], list[str]]:
    """Labels and texts of an ARC question's options. Raises RowError."""
    choices = value_of(row, "choices")
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


def read(row: Row, source: "Source") -> list[Message]:
    question, answer = text_of(row, "question"), text_of(row, "answerKey")
    labels, texts = arc_options(row)
    if answer not in labels:
        raise RowError(f"answerKey {answer!r} is not among the labels {labels}")
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    return turns(f"{question}\n{options}\nAnswer with the letter of the right option.", answer)
