"""The tasks of `remix eval`: items, a line per answer, scores from the lines. A new task is one class here.

A scorer reads its data when it is made, so that everything wrong with it shows before the first forward pass.
"""

import hashlib
import json
import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from remix_cli.data.chunks import start_size
from remix_cli.data.encode import EncodedRow, load_examples
from remix_cli.data.formats import Example, RowError, to_example
from remix_cli.data.sources import load_rows
from remix_cli.data.splits import evenly
from remix_cli.errors import DataError, shortened
from remix_cli.evaluate import arc, gsm8k, humaneval
from remix_cli.evaluate.generate import Decoding, check_fits, generate
from remix_cli.evaluate.nll import iter_row_losses
from remix_cli.evaluate.reasoning import Verifier
from remix_cli.evaluate.statistics import Score, mean, pass_at, ratio
from remix_cli.recipe import Source, Task
from remix_cli.runs import Subject
from remix_cli.sandbox import outside as sandbox

Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to evaluate, besides what a task says of itself."""

    base: bool = False  # the model without its adapter
    limit: int | None = None
    active: int | None = None  # k, if not the trained one
    sampled: bool = False  # draw the selections as in training instead of taking the top k
    allow_code: bool = False  # run programs that the model writes, confined


class Scorer(ABC):
    """One task on one model. `headline` names the entry of a line that the progress bar averages."""

    headline = "correct"
    prompt = "{prompt}"  # the task's own words around a question, for the stamp

    def __init__(self, subject: Subject, task: Task, settings: Settings):
        self.subject, self.task, self.settings = subject, task, settings
        self.encoder = subject.encoder
        self.batch_size = start_size(subject.recipe.eval.batch_size, subject.device)
        self.seed = subject.recipe.seed
        self.selection_seed = self.seed if settings.sampled and not settings.base else None
        self.limit = settings.limit or task.limit
        self.shots = load_examples([task.shots_from])[0][: task.shots] if task.shots_from else []
        if len(self.shots) < task.shots:
            raise DataError(
                f"eval task {task.task}: shots: {task.shots} solved examples are asked for, and shots_from has "
                f"{len(self.shots)}; ask for as many, or give a file with more"
            )
        self.load()
        if not len(self.keys):
            raise DataError(f"eval task {task.task}: no rows; give data.validation, a source for the task, or --data")

    data: list[Any]  # what was read, for the fingerprint
    keys: list[str]  # one hash per item of exactly what the model is shown

    @abstractmethod
    def load(self) -> None:
        """Set `data` and `keys`. Raises DataError."""

    @abstractmethod
    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        """(item, line) for the items `todo`, in whatever order they come."""

    @abstractmethod
    def scores(self, lines: list[Line]) -> dict[str, Score]: ...

    def stamp(self) -> dict[str, Any]:
        """What besides the model decides the scores."""
        template = [self.prompt, self.encoder.chat and self.subject.tokenizer.chat_template]
        return {
            "task": self.task.task,
            "items": len(self.keys),
            "data": _digest([json.dumps(self.data, sort_keys=True, default=str)]),
            "prompt_template": _digest([json.dumps(template)]),
            "prompts": _digest(self.keys),
            "shots": self.task.shots,
            "chat_template": self.encoder.chat,
            "decoding": "log-likelihood",
        }


class Generating(Scorer):
    """A task answered by generation: one prompt per item."""

    max_new_tokens = 256
    prompts: list[list[int]]

    def ask(self, prompts: list[list[int]]) -> None:
        """Set the prompts, and the keys from them."""
        self.prompts, self.keys = prompts, [_key(ids) for ids in prompts]
        check_fits(self.subject, self.task, prompts, new=self.decoding().max_new_tokens)

    def stamp(self) -> dict[str, Any]:
        temperature, how = self.task.temperature, self.decoding()
        rule = f"sampled at temperature {temperature:g}, seed {self.seed}" if temperature else "greedy"
        return super().stamp() | {"decoding": f"{rule}, at most {how.max_new_tokens} new tokens"}

    def decoding(self) -> Decoding:
        length = self.task.max_new_tokens or self.max_new_tokens
        return Decoding(length, self.task.temperature, (), self.seed, self.selection_seed)

    def answers(self, todo: list[int]) -> Iterator[tuple[int, str]]:
        picked = [self.prompts[i] for i in todo]
        for j, text in generate(self.subject, picked, todo, self.decoding(), self.batch_size):
            yield todo[j], text

    def prompt_ids(self, example: Example) -> list[int]:
        """Raises DataError."""
        try:
            return self.encoder.prompt_ids(self.encoder.with_shots(example, self.shots))
        except RowError as error:
            question = example.messages[-2]["content"]
            raise DataError(f"eval task {self.task.task}: {error}, in the row {shortened(question, 60)!r}") from None


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _key(*ids: Any) -> str:
    return hashlib.sha256(b"|".join(np.asarray(x, np.int32).tobytes() for x in ids)).hexdigest()[:16]


def _share(lines: list[Line], key: str) -> Score:
    return mean(np.array([float(line[key]) for line in lines]))


def task_examples(subject: Subject, task: Task, limit: int | None = None) -> list[Example]:
    """The task's own rows, or the rows the recipe held out of training; at most `limit`, spread evenly over them."""
    examples = load_examples([task.source])[0] if task.source is not None else subject.split()[2]
    return evenly(examples, limit)


class HeldOutLoss(Scorer):
    """Nats per supervised token of any rows, and perplexity; the same for each task name."""

    headline = "mean_nats"

    def load(self) -> None:
        examples = task_examples(self.subject, self.task, self.limit)
        self.rows: list[EncodedRow] = self.encoder.encode_rows(examples).rows
        if examples and not self.rows:
            raise DataError("eval task nll: no row has a supervised token within data.max_length")
        self.data = [list(example.messages) for example in examples]
        self.keys = [_key(row.input_ids, row.supervised) for row in self.rows]

    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        rows = [self.rows[i] for i in todo]
        s = self.subject
        for j, loss in iter_row_losses(s.model, s.adapter, rows, self.batch_size, self.selection_seed, todo):
            per_token = loss.nats / loss.tokens
            yield (
                todo[j],
                {"task": rows[j].task, "nats": loss.nats, "tokens": loss.tokens, "mean_nats": per_token},
            )

    def scores(self, lines: list[Line]) -> dict[str, Score]:
        found = {"loss": self._loss(lines)}
        loss = found["loss"]
        value, low, high = (math.exp(min(x, 700)) for x in (loss.value, loss.low, loss.high))
        found["perplexity"] = Score(value, low, high, loss.count, share=False)
        names = sorted({line["task"] for line in lines})
        for name in names if len(names) > 1 else []:
            found[f"loss/{name}"] = self._loss([line for line in lines if line["task"] == name])
        return found

    def _loss(self, lines: list[Line]) -> Score:
        nats, tokens = (np.array([line[key] for line in lines], float) for key in ("nats", "tokens"))
        return ratio(nats, tokens, share=False)


class Gsm8k(Generating):
    """Generation; exact match of the number after `####` (strict) and of the last number (flexible)."""

    headline = "flexible_correct"

    def load(self) -> None:
        examples = task_examples(self.subject, self.task, self.limit)
        self.gold = []
        for number, example in enumerate(examples, start=1):
            gold = gsm8k.reference_answer(example.messages[-1]["content"])
            if gold is None:
                raise DataError(f"eval task gsm8k: row {number}: the reference answer has no plain number after ####")
            self.gold.append(gold)
        self.ask([self.prompt_ids(example) for example in examples])
        self.data = [list(example.messages) for example in examples]

    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        for i, text in self.answers(todo):
            strict, flexible = gsm8k.strict_answer(text), gsm8k.flexible_answer(text)
            yield (
                i,
                {
                    "output": text,
                    "gold": str(self.gold[i]),
                    "strict": None if strict is None else str(strict),
                    "flexible": None if flexible is None else str(flexible),
                    "strict_correct": strict == self.gold[i],
                    "flexible_correct": flexible == self.gold[i],
                },
            )

    def scores(self, lines: list[Line]) -> dict[str, Score]:
        return {
            "strict": _share(lines, "strict_correct"),
            "flexible": _share(lines, "flexible_correct"),
            "has_answer": mean(np.array([float(line["strict"] is not None) for line in lines])),
        }


class Arc(Scorer):
    """Likelihood of the options, by letter and by text: see arc.py."""

    headline = "letter_correct"
    prompt = arc.TEXT_PROMPT

    def load(self) -> None:
        source = self._source(self.task.source)
        rows = evenly(load_rows(source), self.limit)
        shot_source = self.task.shots_from
        solved = load_rows(shot_source)[: self.task.shots] if shot_source else []
        self.questions, self.letters, self.texts = [], [], []
        try:
            shots = [arc.read_question(row, self._source(shot_source)) for row in solved]
        except RowError as error:
            raise DataError(f"eval task arc: shots_from: {error}") from None
        for number, row in enumerate(rows, start=1):
            try:
                question = arc.read_question(row, source)
                self.letters.append(arc.letter_rows(question, row, source, self.encoder, self.shots))
                self.texts.append(arc.text_rows(question, self.encoder, shots))
            except RowError as error:
                raise DataError(f"eval task arc: row {number}: {error}") from None
            self.questions.append(question)
        rows_of_options = [row.input_ids for made in (*self.letters, *self.texts) for row in made]
        check_fits(self.subject, self.task, rows_of_options)
        self.data = rows
        both = zip(self.letters, self.texts, strict=True)
        self.keys = [_key(*(x for row in (*a, *b) for x in (row.input_ids, row.supervised))) for a, b in both]

    def _source(self, source: Source | None) -> Source:
        if source is None:
            raise DataError("eval task arc: which questions? give the task a source, or --data FILE")
        return source.model_copy(update={"format": "arc"})

    def stamp(self) -> dict[str, Any]:
        letter = "chat template" if self.encoder.chat else "plain text"
        return super().stamp() | {"protocol": f"letter in the {letter}, text after a plain 'Answer:'"}

    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        flat = [(i, kind, row) for i in todo for kind in (self.letters, self.texts) for row in kind[i]]
        found: dict[int, dict[int, float]] = {i: {} for i in todo}
        first: dict[int, int] = {}
        for position, (i, _, _) in enumerate(flat):
            first.setdefault(i, position)
        s = self.subject
        rows, ids = [row for _, _, row in flat], [i for i, _, _ in flat]
        for j, loss in iter_row_losses(s.model, s.adapter, rows, self.batch_size, self.selection_seed, ids):
            i = ids[j]
            found[i][j - first[i]] = loss.nats
            letters = len(self.letters[i])
            if len(found[i]) == letters + len(self.texts[i]):
                nats = [found[i][p] for p in range(len(found[i]))]
                yield i, arc.verdict(self.questions[i], nats[:letters], nats[letters:])

    def scores(self, lines: list[Line]) -> dict[str, Score]:
        return {name: _share(lines, f"{name}_correct") for name in ("letter", "text", "text_norm")}


class HumanEval(Generating):
    """Programs written by the model, run against the problems' tests in a sandbox; pass@k."""

    max_new_tokens = 512

    def load(self) -> None:
        problems = humaneval.load_problems(self.task.source)
        self.problems = evenly(problems, self.limit)
        self.chat = self.encoder.chat
        self.prompt = humaneval.CHAT_PROMPT if self.chat else "{prompt}"
        self.prompts = [ids for problem in self.problems for ids in [self._ids(problem)] * self.task.samples]
        if self.shots and not self.chat:
            raise DataError("eval task humaneval: shots: the bare prompt takes no solved examples; leave them out")
        check_fits(self.subject, self.task, self.prompts, new=self.decoding().max_new_tokens)
        self.data = self.problems
        self.keys = [_key(ids, [i % self.task.samples]) for i, ids in enumerate(self.prompts)]

    def _ids(self, problem: Line) -> list[int]:
        if not self.chat:
            try:
                return self.encoder.text_ids(problem["prompt"])
            except RowError as error:
                raise DataError(f"eval task humaneval: {problem['task_id']}: {error}") from None
        question = humaneval.CHAT_PROMPT.format(prompt=problem["prompt"].rstrip("\n"))
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": "x"})
        return self.prompt_ids(Example(turns, "humaneval"))

    def decoding(self) -> Decoding:
        return replace(super().decoding(), stop=() if self.chat else humaneval.STOPS)

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
        programs = [humaneval.program_of(t, p, self.chat) for (_, t), p in zip(answers, problems, strict=True)]
        for j, verdict in sandbox.judge_all(programs):
            i, text = answers[j]
            line: Line = {"problem": problems[j]["task_id"], "index": i // self.task.samples, "output": text}
            printed = verdict.output[-2000:]
            yield i, line | {"correct": verdict.passed, "reason": verdict.reason, "printed": printed}

    def scores(self, lines: list[Line]) -> dict[str, Score]:
        n = self.task.samples
        correct: dict[int, int] = {}
        for line in lines:
            correct[line["index"]] = correct.get(line["index"], 0) + line["correct"]
        found = {
            f"pass@{k}": mean(np.array([pass_at(k, n, c) for c in correct.values()])) for k in (1, 10, 100) if k <= n
        }
        timeouts = np.array([float(line["reason"] == "timeout") for line in lines])
        return found | {"timeout": mean(timeouts)}

    def stamp(self) -> dict[str, Any]:
        protocol = "chat, code block or whole answer" if self.chat else "completion of the bare prompt"
        return super().stamp() | {
            "samples": self.task.samples,
            "protocol": protocol,
            "isolation": sandbox.LEVEL | {"python": platform.python_version()},
        }


class ReasoningGym(Generating):
    """Generation, scored by the verifiers of the package reasoning-gym."""

    headline = "score"

    def load(self) -> None:
        own = [self.task.source] if self.task.source else self.subject.recipe.data.validation
        sources = [source for source in own if source.reasoning_gym]
        if not sources:
            raise DataError("eval task reasoning_gym: no reasoning_gym source among data.validation or in the task")
        if self.task.source is None and self.subject.held_out is not None:
            self.subject.split()  # another version of the package may make other rows
        made: list[tuple[Verifier, int, Example]] = []
        for source in sources:
            verifier = Verifier(source)
            for j, entry in enumerate(verifier.entries):
                row = {"prompt": entry["question"], "completion": str(entry["answer"])}
                made.append((verifier, j, to_example(row, source)))
        self.items = evenly(made, self.limit)
        self.ask([self.prompt_ids(example) for _, _, example in self.items])
        self.data = [[list(example.messages), verifier.facts(j)] for verifier, j, example in self.items]

    def stamp(self) -> dict[str, Any]:
        return super().stamp() | {"protocol": f"verifiers of reasoning-gym {self.items[0][0].version}"}

    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        for i, text in self.answers(todo):
            verifier, j, example = self.items[i]
            gold = example.messages[-1]["content"]
            yield i, {"task": example.task, "output": text, "gold": gold, "score": verifier.score(j, text)}

    def scores(self, lines: list[Line]) -> dict[str, Score]:
        found = {"score": _share(lines, "score")}
        names = sorted({line["task"] for line in lines})
        for name in names if len(names) > 1 else []:
            found[f"score/{name}"] = _share([line for line in lines if line["task"] == name], "score")
        return found


SCORERS: dict[str, type[Scorer]] = {
    "nll": HeldOutLoss,
    "gsm8k": Gsm8k,
    "arc": Arc,
    "humaneval": HumanEval,
    "reasoning_gym": ReasoningGym,
}
