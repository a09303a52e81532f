"""Tasks of the package reasoning-gym, scored by its own verifiers, as far as these only read the answer."""

import inspect
import re
import sys
from importlib.metadata import version
from typing import Any

from remix_cli.data.sources import reasoning_gym_dataset
from remix_cli.errors import DataError
from remix_cli.recipe import Source

# Some of the package's verifiers run the answer as an expression, which could be any program.
_RUNS_CODE = re.compile(r"\b(eval|exec|parse_expr|sympify|parse_latex|import_module)\s*\(")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Verifier:
    """The entries of one source, and their verifier. Raises DataError for one that would run what a model wrote."""

    def __init__(self, source: Source):
        self.dataset = reasoning_gym_dataset(source)
        self.version = version("reasoning-gym")
        for kind in type(self.dataset).__mro__:
            if kind.__module__.startswith("reasoning_gym") and _RUNS_CODE.search(_source_of(kind.__module__)):
                raise DataError(
                    f"eval task reasoning_gym: the verifier of {source.reasoning_gym} runs answers as code, so it is "
                    "not used; score this task by its loss (nll)"
                )
        self.entries = list(self.dataset)[: source.limit]

    def score(self, index: int, text: str) -> float:
        """In [0, 1], by the task's own rules; what stands in <answer> tags if there are any, else the whole text."""
        found = _ANSWER.findall(text)
        answer = (found[-1] if found else text).strip()
        try:
            return float(self.dataset.score_answer(answer=answer, entry=self.entries[index]))
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError):
            return 0.0  # an answer that the verifier cannot read

    def facts(self, index: int) -> Any:
        """What the verifier knows of an entry, for the fingerprint."""
        return self.entries[index].get("metadata")


def _source_of(module: str) -> str:
    return inspect.getsource(sys.modules[module])
