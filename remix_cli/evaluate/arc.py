"""ARC-Challenge by likelihood, in two protocols that give different numbers, so both are reported.

By letter: the question with its options as the recipes' `arc` format shows it, the letters compared. By text: the
question alone, each option's text compared after `Answer:`, its log-likelihood as it is and per character; that is how
lm-evaluation-harness scores `arc_challenge` (acc and acc_norm).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from remix_cli.data.encode import EncodedRow, Encoder
from remix_cli.data.formats import RowError, arc_options, to_example
from remix_cli.recipe import Source

TEXT_PROMPT = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Question:
    question: str
    labels: list[str]
    options: list[str]
    right: int


def read_question(row: dict[str, Any], source: Source) -> Question:
    """Raises RowError."""
    to_example(row, source)  # every check of the format
    labels, options = arc_options(row)
    return Question(row["question"], labels, options, labels.index(row["answerKey"]))


def letter_rows(question: Question, row: dict[str, Any], source: Source, encoder: Encoder, shots: list) -> list:
    """One row per label, the label alone supervised: the end token after it would favour no option."""
    made = []
    for label in question.labels:
        example = to_example(row | {"answerKey": label}, source)
        ids, supervised = encoder.encode(encoder.with_shots(example, shots))
        made.append(_row(ids[:-1], supervised[:-1]))
    return made


def text_rows(question: Question, encoder: Encoder, shots: list[Question]) -> list[EncodedRow]:
    """One row per option, its text supervised, plain text whatever the model."""
    solved = [f"{TEXT_PROMPT.format(question=s.question)} {s.options[s.right]}\n\n" for s in shots]
    prompt = "".join(solved) + TEXT_PROMPT.format(question=question.question)
    made = []
    for option in question.options:
        given = encoder.text_ids(prompt)
        whole = encoder.text_ids(f"{prompt} {option}")
        made.append(_row(whole, [i >= len(given) for i in range(len(whole))]))
    return made


def _row(ids: list[int], supervised: list[bool]) -> EncodedRow:
    if not any(supervised[1:]):
        raise RowError("an option has no token of its own")
    last = int(np.flatnonzero(supervised)[-1])
    first = last
    while first and supervised[first - 1]:
        first -= 1
    only = np.zeros(len(ids), bool)
    only[first : last + 1] = True  # not the answers of the examples before
    return EncodedRow(np.array(ids, np.int32), only, "arc")


def verdict(question: Question, letter_nats: list[float], text_nats: list[float]) -> dict[str, Any]:
    """What each protocol chose; nats are minus the log-likelihoods of the options, in order."""
    per_character = [nats / len(option) for nats, option in zip(text_nats, question.options, strict=True)]
    chosen = {"letter": letter_nats, "text": text_nats, "text_norm": per_character}
    line: dict[str, Any] = {"gold": question.labels[question.right], "nats_text": text_nats, "nats_letter": letter_nats}
    for name, nats in chosen.items():
        best = int(np.argmin(nats))
        line[name] = question.labels[best]
        line[f"{name}_correct"] = best == question.right
    return line
