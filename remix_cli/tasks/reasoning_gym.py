"""Tasks of the package reasoning-gym, scored by its own verifiers, as far as these only read the answer."""

import inspect
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from remix_cli.data.formats import Example, to_example
from remix_cli.errors import DataError
from remix_cli.tasks.base import Generating, Line, Measure, TaskStamp

if TYPE_CHECKING:
    from remix_cli.recipe import Source

# Some of the package's verifiers run the answer as an expression, which could be any program.
_RUNS_CODE = re.compile(r"\b(eval|exec|parse_expr|sympify|parse_latex|import_module)\s*\(")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGym(Generating):
    name = "reasoning_gym"
    measures = (Measure("score", "score", shown=True, by_task=True),)
    headline = "score"

    def load(self) -> None:
        from remix_cli.data.splits import evenly

        own = [self.task.source] if self.task.source else self.subject.recipe.data.validation
        sources = [source for source in own if source.reasoning_gym]
        if not sources:
            raise DataError("eval task reasoning_gym: no reasoning_gym source among data.validation or in the task")
        if self.task.source is None and self.subject.held_out is not None:
            self.subject.held_out_examples()  # another version of the package may make other rows
        made: list[tuple[Verifier, int, Example]] = []
        for source in sources:
            verifier = Verifier(source)
            for j, entry in enumerate(verifier.entries):
                row = {"prompt": entry["question"], "completion": str(entry["answer"])}
                made.append((verifier, j, to_example(row, source)))
        self.items = evenly(made, self.limit)
        self.ask([self.prompt_ids(example) for _, _, example in self.items])
        self.data = [[list(example.messages), verifier.facts(j)] for verifier, j, example in self.items]

    def stamp(self) -> TaskStamp:
        verifier, _, _ = self.items[0]
        return replace(super().stamp(), protocol=f"verifiers of reasoning-gym {verifier.version}")

    def judge(self, item: int, text: str) -> Line:
        verifier, j, example = self.items[item]
        gold = example.messages[-1]["content"]
        return {"task": example.task, "output": text, "gold": gold, "score": verifier.score(j, text)}


class Verifier:
    """The entries of one source, and their verifier. Raises DataError for one that would run what a model wrote."""

    def __init__(self, source: "Source"):
        from remix_cli.data.sources import reasoning_gym_dataset

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
