"""sweep.json: what a sweep has tried, chosen and scored. Folders are relative to its own."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remix_cli.errors import ArtefactError
from remix_cli.recipe.sweep_grammar import Setting
from remix_cli.stored_json import Damaged, Document, check_kinds, read_fields, read_object

FILE = "sweep.json"
MEND = "move it away and give the `remix sweep` again, which keeps its runs"


@dataclass(frozen=True)
class SearchedPoint:
    """One setting of an arm under the first seed."""

    setting: Setting
    run: str  # its folder
    value: float | None  # of the metric; None if the run failed
    error: str | None = None  # in one line


@dataclass(frozen=True)
class ArmRecord:
    searched: list[SearchedPoint]
    chosen: Setting | None  # None as long as there is no best
    reports: list[str]  # of the best setting, one a seed

    @classmethod
    def from_dict(cls, document: Any) -> "ArmRecord":
        found = check_kinds(document, {"searched": list, "chosen": dict | None, "reports": list})
        searched = [read_fields(SearchedPoint, point) for point in found["searched"]]
        if not all(isinstance(report, str) for report in found["reports"]):
            raise Damaged("reports is damaged")
        return cls(searched, found["chosen"], found["reports"])


@dataclass(frozen=True)
class SweepRecord:
    metric: str
    seeds: list[int]
    arms: dict[str, ArmRecord]  # as the sweep's file orders them; the first is the reference
    left: str | None = None  # what was still to be done when it was stopped, in words

    def to_dict(self) -> Document:
        document = asdict(self)
        if self.left is None:
            del document["left"]
        return document

    @classmethod
    def from_dict(cls, document: Any) -> "SweepRecord":
        """Raises Damaged."""
        found = check_kinds(document, {"metric": str, "seeds": list, "arms": dict})
        arms = {name: ArmRecord.from_dict(arm) for name, arm in found["arms"].items()}
        left = document.get("left")
        if not isinstance(left, str | None):
            raise Damaged("left is damaged")
        return cls(found["metric"], found["seeds"], arms, left)


def read_record(path: Path) -> SweepRecord:
    """What `remix sweep` wrote when it ended, or was stopped. Raises ArtefactError."""
    try:
        return SweepRecord.from_dict(read_object(path))
    except Damaged as error:
        raise ArtefactError(f"{path}: {error}; {MEND}") from None
