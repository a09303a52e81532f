"""What a task declares of itself, and what it gets for it.

A task is a class: its data (`load`), a line for each item (`run`), scores from the lines. It reads its data when it is
made, so that everything wrong with it shows before the first forward pass. What it declares in class attributes is all
that recipes, `compare`, the console and sweeps know of it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from remix_cli.data.formats import Example, RowError
from remix_cli.errors import DataError, shortened
from remix_cli.own_settings import Setting
from remix_cli.stored_json import Document

if TYPE_CHECKING:
    from remix_cli.data.rows import EncodedRow
    from remix_cli.evaluation.generate import Decoding
    from remix_cli.evaluation.statistics import Score
    from remix_cli.recipe import Task
    from remix_cli.runs import Subject

Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to evaluate, besides what a task says of itself."""

    base: bool = False  # the model without its adapter
    limit: int | None = None
    active: int | None = None  # k, if not the trained one
    sampled: bool = False  # draw the selections as in training instead of taking the top k
    allow_code: bool = False  # run programs that the model writes, confined


@dataclass(frozen=True)
class Measure:
    """A score: the sum of one entry of the lines over that of another, or over their number.

    `above` None: the task makes the score itself, and no two models can be compared on it item by item.
    """

    name: str
    above: str | None = None  # the entry of a line that is added up
    below: str | None = None  # and what it is divided by; None: 1 for each item
    lower_is_better: bool = False
    share: bool = True  # a proportion, shown in per cent; otherwise a number such as nats
    shown: bool = False  # while training, beside the held-out loss
    by_task: bool = False  # also for each name in the lines' entry `task`, as <name>/<task>
    chooses: bool = True  # may choose the best adapter


# What must agree for two scores to mean the same.
COMPARED = ("task", "data", "prompt_template", "shots", "decoding", "chat_template", "prompts", "protocol", "samples")


@dataclass(frozen=True, kw_only=True)
class TaskStamp:
    """What was asked, and how: everything besides the model that decides the scores. Digests are hexadecimal."""

    task: str
    items: int
    data: str  # digest of what was read
    prompt_template: str  # digest of the task's own words and the chat template
    prompts: str  # digest of exactly what the model was shown
    shots: int
    chat_template: bool
    decoding: str
    samples: int | None = None  # answers to each item, where a task takes several
    protocol: str | None = None  # where a task has a choice of its own
    more: Document = field(default_factory=dict)  # whatever else a task says; no comparison depends on it

    def to_dict(self) -> Document:
        """As it stands in a report: `more` among the other keys, and without what is None."""
        document = asdict(self)
        more = document.pop("more")
        return {key: value for key, value in document.items() if value is not None} | more

    def differences(self, other: "TaskStamp") -> str:
        """Which parts of two stamps forbid a comparison of their scores, in words; empty if none."""
        return ", ".join(f"other {key}" for key in COMPARED if getattr(self, key) != getattr(other, key))


class Scorer(ABC):
    """One task on one model."""

    name: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    headline: ClassVar[str]  # the entry of a line that the progress bar averages
    generates: ClassVar[bool] = False
    max_new_tokens: ClassVar[int] = 0  # of an answer, where the task does not say otherwise
    runs_code: ClassVar[bool] = False  # of the model's: only where it is allowed, never while training
    takes_shots: ClassVar[bool] = True
    takes_samples: ClassVar[bool] = False  # several answers to one item
    brings_rows: ClassVar[bool] = False  # has rows without a source
    own_columns: ClassVar[bool] = False  # reads columns of its own, whatever the source's format
    row_format: ClassVar[str | None] = None  # the data format of its rows; None: any
    own_settings: ClassVar[dict[str, Setting]] = {}  # keys of the recipe's task that it brings along
    any_rows: ClassVar[bool] = False  # scores whatever rows training reads, and training measures it anyway
    prompt = "{prompt}"  # the task's own words around a question, for the stamp

    data: list[Any]  # what was read, for the fingerprint
    keys: list[str]  # one hash for each item of exactly what the model is shown

    def __init__(self, subject: "Subject", task: "Task", settings: Settings):
        from remix_cli.data.chunks import start_size
        from remix_cli.data.encode import load_examples

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

    def own(self, key: str) -> Any:
        """What the recipe says in one of `own_settings`."""
        return getattr(self.task, key)

    @abstractmethod
    def load(self) -> None:
        """Set `data` and `keys`. Raises DataError."""

    @abstractmethod
    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        """(item, line) for the items `todo`, in whatever order they come."""

    def scores(self, lines: list[Line]) -> dict[str, "Score"]:
        """Every declared measure that lines have entries for, and its parts by task."""
        found = {}
        for measure in self.measures:
            if measure.above is None:
                continue
            found[measure.name] = measured(measure, lines)
            if measure.by_task:
                found |= self._by_task(measure, lines)
        return found

    @staticmethod
    def _by_task(measure: Measure, lines: list[Line]) -> dict[str, "Score"]:
        by_name: dict[str, list[Line]] = {}
        for line in sorted(lines, key=lambda line: line["task"]):
            by_name.setdefault(line["task"], []).append(line)
        if len(by_name) < 2:
            return {}
        return {f"{measure.name}/{name}": measured(measure, some) for name, some in by_name.items()}

    def examples(self) -> list[Example]:
        """The task's own rows, or those that the recipe held out; at most `limit`, spread evenly over them."""
        from remix_cli.data.encode import load_examples
        from remix_cli.data.splits import evenly

        own = self.task.source
        rows = load_examples([own])[0] if own is not None else self.subject.held_out_examples()
        return evenly(rows, self.limit)

    def check_fits(self, texts: Sequence[Sized], new: int = 0) -> None:
        """Raises DataError for token ids that, with `new` ones of an answer, the model cannot read at once."""
        from remix_cli.evaluation.generate import check_fits

        check_fits(self.subject, self.task, texts, new)

    def row_losses(self, rows: list["EncodedRow"], ids: list[int]) -> Iterator[tuple[int, Any]]:
        """(place among `rows`, its loss), longest rows first. `ids` key what is sampled, if anything is."""
        from remix_cli.evaluation.nll import iter_row_losses

        s = self.subject
        return iter_row_losses(s.model, s.adapter, rows, self.batch_size, self.selection_seed, ids)

    def stamp(self) -> TaskStamp:
        template = [self.prompt, self.encoder.chat and self.subject.tokenizer.chat_template]
        return TaskStamp(
            task=self.task.task,
            items=len(self.keys),
            data=digest([json.dumps(self.data, sort_keys=True, default=str)]),
            prompt_template=digest([json.dumps(template)]),
            prompts=digest(self.keys),
            shots=self.task.shots,
            chat_template=self.encoder.chat,
            decoding="log-likelihood",
        )


class Prompting(Scorer):
    """A task answered by generation, one prompt for each item: `load` ends with `ask`, `run` reads `answers`."""

    generates = True
    headline = "correct"
    max_new_tokens = 256
    prompts: list[list[int]]

    def ask(self, prompts: list[list[int]]) -> None:
        """Set the prompts, and the keys from them."""
        self.prompts, self.keys = prompts, [key_of(ids) for ids in prompts]
        self.check_fits(prompts, new=self.decoding().max_new_tokens)

    def stamp(self) -> TaskStamp:
        temperature = self.task.temperature
        rule = f"sampled at temperature {temperature:g}, seed {self.seed}" if temperature else "greedy"
        length = self.decoding().max_new_tokens
        return replace(super().stamp(), decoding=f"{rule}, at most {length} new tokens")

    def decoding(self) -> "Decoding":
        from remix_cli.evaluation.generate import Decoding

        length = self.task.max_new_tokens or self.max_new_tokens
        return Decoding(length, self.task.temperature, (), self.seed, self.selection_seed)

    def answers(self, todo: list[int]) -> Iterator[tuple[int, str]]:
        from remix_cli.evaluation.generate import generate

        picked = [self.prompts[i] for i in todo]
        for j, text in generate(self.subject, picked, todo, self.decoding(), self.batch_size):
            yield todo[j], text

    def prompt_ids(self, example: Example) -> list[int]:
        """Raises DataError."""
        if example.messages[0]["role"] == "text":
            raise DataError(f"eval task {self.task.task}: rows of format text hold no question; score them by nll")
        try:
            return self.encoder.prompt_ids(self.encoder.with_shots(example, self.shots))
        except RowError as error:
            question = example.messages[-2]["content"]
            raise DataError(f"eval task {self.task.task}: {error}, in the row {shortened(question, 60)!r}") from None


class Generating(Prompting):
    """The same where each answer is judged by itself: give `load` and `judge`."""

    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        for item, text in self.answers(todo):
            yield item, self.judge(item, text)

    @abstractmethod
    def judge(self, item: int, text: str) -> Line:
        """What is kept of the answer `text` to an item."""


def measured(measure: Measure, lines: list[Line]) -> "Score":
    import numpy as np

    from remix_cli.evaluation.statistics import mean, ratio

    assert measure.above is not None
    above = np.array([float(line[measure.above]) for line in lines])
    if measure.below is None:
        return mean(above)
    return ratio(above, np.array([float(line[measure.below]) for line in lines]), share=measure.share)


def digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def key_of(*ids: Any) -> str:
    """A hash of sequences of token ids."""
    import numpy as np

    return hashlib.sha256(b"|".join(np.asarray(x, np.int32).tobytes() for x in ids)).hexdigest()[:16]
