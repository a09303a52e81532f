"""Exact match: is the answer, or what a regular expression finds in it, one of the references?"""

import string
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import regex
from pydantic import AfterValidator, Field

from remix_cli.data.formats import Example, RowError, to_example
from remix_cli.errors import DataError
from remix_cli.own_settings import Setting
from remix_cli.tasks.base import Generating, Line, Measure

if TYPE_CHECKING:
    from remix_cli.evaluation.generate import Decoding


def _expression(text: str) -> str:
    try:
        regex.compile(text)
    except (regex.error, RecursionError, MemoryError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


Expression = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_expression)]
PATIENCE = 1.0  # seconds for an expression and an answer
ARTICLES = {"a", "an", "the"}


class ExactMatch(Generating):
    name = "exact_match"
    measures = (
        Measure("accuracy", "correct", shown=True, by_task=True),
        Measure("has_answer", "answered", chooses=False),
    )
    own_settings: ClassVar = {
        "extract": Setting(
            Expression | None,
            None,
            "regular expression; its last match in an answer counts, or the match's first group.",
        ),
        "ignore": Setting(
            list[Literal["case", "punctuation", "articles"]], [], "what is not compared; white space never is."
        ),
        "references": Setting(str | None, None, "column of right answers, one or a list; by default the row's answer."),
    }

    enough: int | None = None  # tokens of an answer that can still be right, where all of it counts

    def decoding(self) -> "Decoding":
        usual = super().decoding()
        if self.enough is None or self.task.max_new_tokens:
            return usual
        return replace(usual, max_new_tokens=min(usual.max_new_tokens, self.enough))

    def load(self) -> None:
        examples = self._read()
        if self.own("extract") is None:
            self.enough = self._enough(references for _, references in examples)
        self.ask([self.prompt_ids(example) for example, _ in examples])
        self.data = [[*example.messages, *references] for example, references in examples]
        self.names = [example.task for example, _ in examples]
        self.gold = [self._looked_for(references) for _, references in examples]

    def _enough(self, references: Iterable[list[str]]) -> int:
        """Tokens after which a whole answer can no longer be a reference.

        Twice the longest reference, for an answer may be spelt otherwise, and some for white space; a power of two, so
        that fewer rows ask for the same.
        """
        texts = [text for one in references for text in one]
        longest = max(map(len, self.subject.tokenizer(texts, add_special_tokens=False)["input_ids"]), default=0)
        return 1 << (2 * longest + 7).bit_length()

    def _read(self) -> list[tuple[Example, list[str]]]:
        """Each example with its references: the answer of its row, or the texts of the column `references`."""
        column = self.own("references")
        if column is None:
            return [(example, [example.messages[-1]["content"]]) for example in self.examples()]
        from remix_cli.data.sources import iterate_rows
        from remix_cli.data.splits import evenly

        source = self.task.source
        if source is None:
            raise DataError("eval task exact_match: references: name a source, whose column it is")
        read = []
        for row, origin in evenly(list(iterate_rows(source)), self.limit):
            try:
                read.append((to_example(row, source), references_in(row, column)))
            except RowError as error:
                raise DataError(f"eval task exact_match: {origin}: {error}") from None
        return read

    def judge(self, item: int, text: str) -> Line:
        found = self._found(text)
        answer = None if found is None else plain(found, self.own("ignore"))
        return {
            "task": self.names[item],
            "output": text,
            "found": found,
            "gold": self.gold[item],
            "answered": found is not None,
            "correct": answer in [plain(gold, self.own("ignore")) for gold in self.gold[item]],
        }

    def _found(self, text: str) -> str | None:
        """What `extract` finds last, its first group if it has one; the whole text without `extract`."""
        if self.own("extract") is None:
            return text
        last = None
        try:
            for match in regex.finditer(self.own("extract"), text, timeout=PATIENCE):
                last = match
        except TimeoutError:
            return None
        if last is None:
            return None
        return last.group(1) if last.re.groups else last.group()

    def _looked_for(self, references: list[str]) -> list[str]:
        """A reference may be written as an answer is, with what leads up to it."""
        wanted = []
        for reference in references:
            found = self._found(reference)
            wanted.append(reference if found is None else found)
        return wanted


def references_in(row: dict[str, object], column: str) -> list[str]:
    """One text or several. Raises RowError."""
    value = row.get(column)
    texts = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"column {column!r} should hold a reference or a list of them, none blank")
        texts.append(text)
    if not texts:
        raise RowError(f"column {column!r} holds no reference")
    return texts


def plain(text: str, ignore: Iterable[str]) -> str:
    """`text` without what is ignored; single spaces between words, in any case."""
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = text.translate(str.maketrans("", "", string.punctuation))
    words = text.split()
    if "articles" in ignore:
        words = [word for word in words if word.casefold() not in ARTICLES]
    return " ".join(words)
