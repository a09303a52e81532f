"""Tasks of the package reasoning-gym, scored by its own verifiers."""

import re
from typing import Any

from remix_cli.data.sources import reasoning_gym_dataset
from remix_cli.recipe import Source

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Verifier:
    """The entries of one source, and their verifier."""

    def __init__(self, source: Source):
        self.dataset = reasoning_gym_dataset(source)
        self.entries = list(self.dataset)[: source.limit]

    def score(self, index: int, text: str) -> float:
        """In [0, 1], by the task's own rules; what stands in <answer> tags if there are any, else the whole text."""
        found = _ANSWER.findall(text)
        answer = (found[-1] if found else text).strip()
        return float(self.dataset.score_answer(answer=answer, entry=self._entry(index)))

    def _entry(self, index: int) -> dict[str, Any]:
        return self.entries[index]
