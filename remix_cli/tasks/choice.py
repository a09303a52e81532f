"""Choice: which of a row's options does the model find likeliest as the answer to its prompt?"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from remix_cli.data.formats import Example, RowError, to_example
from remix_cli.data.formats.base import text_of, value_of
from remix_cli.errors import DataError
from remix_cli.own_settings import Setting
from remix_cli.tasks.base import Line, Measure, TaskStamp
from remix_cli.tasks.options import Comparing, only_the_last_answer

if TYPE_CHECKING:
    from remix_cli.data.rows import EncodedRow
    from remix_cli.recipe.sources import Source


class Choice(Comparing):
    name = "choice"
    measures = (
        Measure("accuracy", "correct", shown=True, by_task=True),
        Measure("accuracy_norm", "norm_correct", by_task=True),
    )
    headline = "correct"
    own_settings: ClassVar = {
        "options": Setting(str | list[str] | None, None, "column that holds a list of options, or a list of columns."),
        "answer": Setting(str, "answer", "column that says which option is right."),
    }

    def load(self) -> None:
        from remix_cli.data.sources import iterate_rows
        from remix_cli.data.splits import evenly

        source = self.task.source
        if source is None or self.own("options") is None:
            raise DataError(
                "eval task choice: give it a source, options (the column of the options, or a list of columns) and "
                "answer (the column that says which is right)"
            )
        self.data = []
        self.texts: list[list[str]] = []  # of the options
        self.right: list[int] = []
        made: list[list[EncodedRow]] = []
        for row, origin in evenly(list(iterate_rows(source)), self.limit):
            self.data.append(row)
            try:
                texts, right = options_of(row, self.own("options"), self.own("answer"))
                made.append([self._row(row, source, text) for text in texts])
            except RowError as error:
                raise DataError(f"eval task choice: {origin}: {error}") from None
            self.texts.append(texts)
            self.right.append(right)
        self.compare(made)

    def _row(self, row: dict[str, Any], source: "Source", option: str) -> "EncodedRow":
        """The prompt of the row answered with one option, of which the option alone is supervised."""
        asked = to_example(row, source)
        answered = (*asked.messages[:-1], {"role": "assistant", "content": option})
        example = Example(answered, asked.task, asked.tools)
        ids, supervised = self.encoder.encode(self.encoder.with_shots(example, self.shots))
        return only_the_last_answer(ids[:-1], supervised[:-1], asked.task)  # an end token would favour no option

    def stamp(self) -> TaskStamp:
        return replace(super().stamp(), protocol="the option after the prompt, by its log-likelihood")

    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        for item, nats in self.nats_of_options(todo):
            yield item, self._verdict(item, nats)

    def _verdict(self, item: int, nats: list[float]) -> Line:
        options, right = self.texts[item], self.right[item]
        per_character = [value / len(option) for value, option in zip(nats, options, strict=True)]
        chosen = nats.index(min(nats))
        norm_chosen = per_character.index(min(per_character))
        return {
            "task": self.options[item][0].task,
            "gold": options[right],
            "chosen": options[chosen],
            "nats": nats,
            "correct": chosen == right,
            "norm_correct": norm_chosen == right,
        }


def options_of(row: dict[str, Any], columns: str | list[str], answer: str) -> tuple[list[str], int]:
    """The options of a row and which of them is right. Raises RowError.

    They stand in one column, as a list or as {text: [...], label: [...]}, or in several columns. The answer is a
    label, the name of a column, the text of an option, or its number counted from 0.
    """
    labels: list[str] = []
    if isinstance(columns, list):
        labels = columns
        options = [text_of(row, column) for column in columns]
    else:
        value = value_of(row, columns)
        if isinstance(value, dict):
            labels = [str(label) for label in value.get("label", [])]
            value = value.get("text")
        if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
            raise RowError(f"column {columns!r} should be a list of options, or hold lists 'text' and 'label'")
        options = value
    if len(options) < 2 or not all(option.strip() for option in options):
        raise RowError("there should be two options or more, none blank")
    return options, _right(value_of(row, answer), options, labels, answer)


def _right(said: Any, options: list[str], labels: list[str], column: str) -> int:
    text = str(said).strip()
    for known in (labels, options):
        if known.count(text) == 1:
            return known.index(text)
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    raise RowError(f"column {column!r} is {text!r}, which is no label, option or number from 0 to {len(options) - 1}")
