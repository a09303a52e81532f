"""What `remix eval` writes: the results of several tasks, each with the stamp of how it was made.

RUN/eval/<model>.json is a `Report`. Every type here goes to that JSON with `to_dict` and comes back with `from_dict`,
which raises Damaged for anything else.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from remix_cli.core.description import CONFIG_FILE
from remix_cli.errors import ArtefactError
from remix_cli.evaluation.statistics import Score
from remix_cli.stored_json import Damaged, Document, Kinds, check_kinds, read_fields, read_object
from remix_cli.tasks.base import TaskStamp

MEND = "not a report of `remix eval`, or damaged; evaluate again"


@dataclass(frozen=True, kw_only=True)
class ModelStamp:
    """Which model was asked, and how it was run. Hashes are hexadecimal."""

    model: str
    base_fingerprint: str  # of the base model's weights
    base_works: str | None = None  # of how the base works: its settings and tokenizer; the first reports lack it
    adapter: str | None  # of the adapter's weights; None without an adapter
    method: str | None = None  # the first reports lack it
    routing: str
    dtype: str
    device: str
    versions: dict[str, str]

    def to_dict(self) -> Document:
        document = asdict(self)
        for key in ("base_works", "method"):
            if document[key] is None:
                del document[key]
        return document

    def same_model(self, other: "ModelStamp") -> bool:
        """By the weights, and where both say so by how the base works."""
        if (self.base_fingerprint, self.adapter) != (other.base_fingerprint, other.adapter):
            return False
        return None in (self.base_works, other.base_works) or self.base_works == other.base_works


@dataclass(frozen=True)
class Protocol:
    """The stamp of a result. In JSON it is one flat object: the task's keys, then the model's."""

    asked: TaskStamp
    answered_by: ModelStamp

    def to_dict(self) -> Document:
        return self.asked.to_dict() | self.answered_by.to_dict()

    @classmethod
    def from_dict(cls, document: Any) -> "Protocol":
        asked = read_fields(TaskStamp, document)
        answered_by = read_fields(ModelStamp, document)
        known = {field.name for field in (*fields(TaskStamp), *fields(ModelStamp))}
        more = {key: value for key, value in document.items() if key not in known}
        return cls(replace(asked, more=more), answered_by)


@dataclass(frozen=True)
class TaskResult:
    """The scores of one task, with 95 % intervals, in the order in which the task gives them."""

    task: str  # as the report calls it: `gsm8k`, on the rows of another file `gsm8k@test`
    count: int  # items
    scores: dict[str, Score]
    seconds: float
    asked: int  # items that this evaluation asked for; an interrupted one had answered the others
    protocol: Protocol
    task_digest: str | None = None  # of the task as it was asked; the first reports lack it
    rows: str | None = None  # what its rows are called, unless the task brings them; the first reports lack it

    @property
    def title(self) -> str:
        """The task and, unless its name says so, which rows it is of: `nll (test.jsonl)`."""
        return f"{self.task} ({self.rows})" if self.rows else self.task

    def to_dict(self) -> Document:
        document: Document = {
            "task": self.task,
            "count": self.count,
            "scores": {name: score.value for name, score in self.scores.items()},
            "intervals": {name: [score.low, score.high] for name, score in self.scores.items()},
            "counts": {name: score.count for name, score in self.scores.items()},
            "shares": sorted(name for name, score in self.scores.items() if score.share),
            "seconds": self.seconds,
            "asked": self.asked,
            "protocol": self.protocol.to_dict(),
        }
        if self.task_digest is not None:
            document["task_digest"] = self.task_digest
        if self.rows is not None:
            document["rows"] = self.rows
        return document

    @classmethod
    def from_dict(cls, document: Any) -> "TaskResult":
        found = check_kinds(document, _RESULT)
        scores = {name: _read_score(found, name) for name in found["scores"]}
        protocol = Protocol.from_dict(found["protocol"])
        younger = {key: found.get(key) for key in ("task_digest", "rows")}
        return cls(found["task"], found["count"], scores, found["seconds"], found["asked"], protocol, **younger)


_RESULT: Kinds = {
    "task": str,
    "count": int,
    "scores": dict,
    "intervals": dict,
    "counts": dict,
    "shares": list,
    "seconds": int | float,
    "asked": int,
    "protocol": dict,
}


def _read_score(result: Document, name: str) -> Score:
    value = result["scores"][name]
    interval = result["intervals"].get(name)
    count = result["counts"].get(name)
    is_whole = isinstance(interval, list) and len(interval) == 2 and isinstance(count, int)
    if not is_whole or not all(isinstance(number, int | float) for number in (value, *interval)):
        raise Damaged(f"no {name} of {result['task']} with its interval")
    low, high = interval
    return Score(value, low, high, count, name in result["shares"])


@dataclass(frozen=True)
class Report:
    """Everything that was scored of one model."""

    model: str  # `adapter`, `best`, `base` or `model`, and how it was run if not as usual: `adapter-k2`
    results: list[TaskResult]

    def result(self, task: str) -> TaskResult | None:
        """The result of the task that the report calls so."""
        return next((result for result in self.results if result.task == task), None)

    def to_dict(self) -> Document:
        return {"model": self.model, "results": [result.to_dict() for result in self.results]}

    @classmethod
    def from_dict(cls, document: Any) -> "Report":
        found = check_kinds(document, {"model": str, "results": list})
        return cls(found["model"], [TaskResult.from_dict(result) for result in found["results"]])


@dataclass(frozen=True)
class Evaluation:
    """What one `remix eval` has scored, and where it stands beside the model's other results."""

    report: Report
    file: Path
    notes: list[str]  # for people to read

    def to_dict(self) -> Document:
        return self.report.to_dict() | {"file": str(self.file), "notes": self.notes}

    @classmethod
    def from_dict(cls, document: Any) -> "Evaluation":
        found = check_kinds(document, {"file": str, "notes": list})
        return cls(Report.from_dict(found), Path(found["file"]), found["notes"])


def read_report(path: Path) -> Report:
    """A report of the adapter that lies beside it. Raises ArtefactError."""
    try:
        report = Report.from_dict(read_object(path))
    except Damaged as error:
        raise ArtefactError(f"{path}: {error}; {MEND}") from None
    _check_adapter(path, report)
    return report


def _check_adapter(path: Path, report: Report) -> None:
    """Raises ArtefactError if the run now holds another adapter than was scored: the run was overwritten meanwhile,
    `best/` was replaced, or the report is another run's."""
    which = report.model.partition("-")[0]
    weights = path.parent.parent / which / CONFIG_FILE
    if which not in ("adapter", "best") or not weights.is_file():
        return
    now = str(read_object(weights).get("weights_sha256"))[:16]
    if any(result.protocol.answered_by.adapter != now for result in report.results):
        raise ArtefactError(f"{path}: scores of another adapter than {weights.parent} now holds; evaluate again")
