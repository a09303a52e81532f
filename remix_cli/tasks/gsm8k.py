"""GSM8K's answers: the number after `#### ` (strict) or the last number of the text (flexible).

Strict is what lm-evaluation-harness calls strict-match: four signs, a space, a bare number. Numbers are compared as
numbers, so 72.00 is 72.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from remix_cli.errors import DataError
from remix_cli.tasks.base import Generating, Line, Measure, measured

if TYPE_CHECKING:
    from remix_cli.evaluation.statistics import Score

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
GOES_ON = re.compile(r"[.,]?[\w/:^*+-]")
STRICT = re.compile(r"#### (-?\d[\d,]*(?:\.\d+)?)")


class Gsm8k(Generating):
    name = "gsm8k"
    measures = (
        Measure("strict", "strict_correct"),
        Measure("flexible", "flexible_correct", shown=True),
        Measure("has_answer", chooses=False),
    )
    headline = "flexible_correct"
    row_format = "gsm8k"

    def load(self) -> None:
        examples = self.examples()
        self.gold = []
        for number, example in enumerate(examples, start=1):
            gold = reference_answer(example.messages[-1]["content"])
            if gold is None:
                raise DataError(f"eval task gsm8k: row {number}: the reference answer has no plain number after ####")
            self.gold.append(gold)
        self.ask([self.prompt_ids(example) for example in examples])
        self.data = [list(example.messages) for example in examples]

    def judge(self, item: int, text: str) -> Line:
        strict, flexible, gold = strict_answer(text), flexible_answer(text), self.gold[item]
        return {
            "output": text,
            "gold": str(gold),
            "strict": None if strict is None else str(strict),
            "flexible": None if flexible is None else str(flexible),
            "strict_correct": strict == gold,
            "flexible_correct": flexible == gold,
        }

    def scores(self, lines: list[Line]) -> dict[str, "Score"]:
        answered = [{"answered": line["strict"] is not None} for line in lines]
        return super().scores(lines) | {"has_answer": measured(Measure("has_answer", "answered"), answered)}


def strict_answer(text: str) -> Decimal | None:
    """The number after the first `#### `, None if there is none."""
    found = STRICT.search(text)
    return _number(found.group(1)) if found else None


def reference_answer(text: str) -> Decimal | None:
    """As `strict_answer`, but None where the number is part of something else: 1/2, 3:30, 1e5, 5-6."""
    found = STRICT.search(text)
    if found and GOES_ON.match(text, found.end()):
        return None
    return strict_answer(text)


def flexible_answer(text: str) -> Decimal | None:
    """The last number anywhere in the text, None if there is none."""
    found = NUMBER.findall(text)
    return _number(found[-1]) if found else None


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
