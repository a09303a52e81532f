"""GSM8K's answers: the number after `#### ` (strict) or the last number of the text (flexible).

Strict is what lm-evaluation-harness calls strict-match: four signs, a space, a bare number. Numbers are compared as
numbers, so 72.00 is 72.
"""

import re
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
GOES_ON = re.compile(r"[.,]?[\w/:^*+-]")
STRICT = re.compile(r"#### (-?\d[\d,]*(?:\.\d+)?)")


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
