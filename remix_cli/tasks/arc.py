"""ARC-Challenge by likelihood, in two protocols that give different numbers, so both are reported.

By letter: the question with its options as the recipes' `arc` format shows it, the letters compared. By text: the
question alone, each option's text compared after `Answer:`, its log-likelihood as it is and per character; that is how
lm-evaluation-harness scores `arc_challenge` (acc and acc_norm).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from remix_cli.data.formats import RowError, to_example
from remix_cli.data.formats.arc import arc_options
from remix_cli.errors import DataError
from remix_cli.tasks.base import Line, Measure, TaskStamp
from remix_cli.tasks.options import Comparing, only_the_last_answer

if TYPE_CHECKING:
    from remix_cli.data.encode import Encoder
    from remix_cli.data.rows import EncodedRow
    from remix_cli.recipe import Source

TEXT_PROMPT = "Question: {question}\nAnswer:"


class Arc(Comparing):
    name = "arc"
    measures = (
        Measure("letter", "letter_correct", shown=True),
        Measure("text", "text_correct"),
        Measure("text_norm", "text_norm_correct", shown=True),
    )
    headline = "letter_correct"
    own_columns = True
    row_format = "arc"
    prompt = TEXT_PROMPT

    def load(self) -> None:
        from remix_cli.data.sources import iterate_rows, load_rows
        from remix_cli.data.splits import evenly

        source = self._source(self.task.source)
        rows = evenly(list(iterate_rows(source)), self.limit)
        shot_source = self.task.shots_from
        solved = load_rows(shot_source)[: self.task.shots] if shot_source else []
        self.questions: list[Question] = []
        made: list[list[EncodedRow]] = []  # all by letter, then all by text
        try:
            shots = [read_question(row, self._source(shot_source)) for row in solved]
        except RowError as error:
            raise DataError(f"eval task arc: shots_from: {error}") from None
        for row, origin in rows:
            try:
                question = read_question(row, source)
                letters = letter_rows(question, row, source, self.encoder, self.shots)
                made.append([*letters, *text_rows(question, self.encoder, shots)])
            except RowError as error:
                raise DataError(f"eval task arc: {origin}: {error}") from None
            self.questions.append(question)
        self.data = [row for row, _ in rows]
        self.compare(made)

    def _source(self, source: "Source | None") -> "Source":
        if source is None:
            raise DataError("eval task arc: which questions? give the task a source, or --data FILE")
        return source.model_copy(update={"format": "arc"})

    def stamp(self) -> TaskStamp:
        letter = "chat template" if self.encoder.chat else "plain text"
        return replace(super().stamp(), protocol=f"letter in the {letter}, text after a plain 'Answer:'")

    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        for item, nats in self.nats_of_options(todo):
            letters = len(self.questions[item].labels)
            yield item, verdict(self.questions[item], nats[:letters], nats[letters:])


@dataclass(frozen=True)
class Question:
    question: str
    labels: list[str]
    options: list[str]
    right: int


def read_question(row: dict[str, Any], source: "Source") -> Question:
    """Raises RowError."""
    to_example(row, source)  # every check of the format
    labels, options = arc_options(row)
    return Question(row["question"], labels, options, labels.index(row["answerKey"]))


def letter_rows(question: Question, row: dict[str, Any], source: "Source", encoder: "Encoder", shots: list) -> list:
    """One row per label, the label alone supervised: the end token after it would favour no option."""
    made = []
    for label in question.labels:
        example = to_example(row | {"answerKey": label}, source)
        ids, supervised = encoder.encode(encoder.with_shots(example, shots))
        made.append(only_the_last_answer(ids[:-1], supervised[:-1], "arc"))
    return made


def text_rows(question: Question, encoder: "Encoder", shots: list[Question]) -> list["EncodedRow"]:
    """One row per option, its text supervised, plain text whatever the model."""
    solved = [f"{TEXT_PROMPT.format(question=s.question)} {s.options[s.right]}\n\n" for s in shots]
    prompt = "".join(solved) + TEXT_PROMPT.format(question=question.question)
    made = []
    for option in question.options:
        given = encoder.text_ids(prompt)
        whole = encoder.text_ids(f"{prompt} {option}")
        made.append(only_the_last_answer(whole, [i >= len(given) for i in range(len(whole))], "arc"))
    return made


def verdict(question: Question, letter_nats: list[float], text_nats: list[float]) -> dict[str, Any]:
    """What each protocol chose; nats are minus the log-likelihoods of the options, in order."""
    per_character = [nats / len(option) for nats, option in zip(text_nats, question.options, strict=True)]
    chosen = {"letter": letter_nats, "text": text_nats, "text_norm": per_character}
    line: dict[str, Any] = {"gold": question.labels[question.right], "nats_text": text_nats, "nats_letter": letter_nats}
    for name, nats in chosen.items():
        best = nats.index(min(nats))
        line[name] = question.labels[best]
        line[f"{name}_correct"] = best == question.right
    return line
