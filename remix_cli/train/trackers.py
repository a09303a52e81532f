"""The trackers of one run: each is given every step of metrics.jsonl whole, in order, and once.

A run that was killed is resumed from its last checkpoint and makes the steps after it again, to the same bits, clocks
aside. So a tracked run is taken up like this: what it holds already stays and is not sent again, and what it lacks of
the steps before the checkpoint is sent from metrics.jsonl.
"""

import uuid
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from io import StringIO
from typing import TYPE_CHECKING, Any

from remix_cli.errors import RecipeError, shortened
from remix_cli.recipe import Recipe
from remix_cli.runs import RunFolder
from remix_cli.storage import write_json
from remix_cli.stored_json import Damaged, Kinds, check_kinds, read_object
from remix_cli.train.tracker_tools import TOOLS, Following, Row, Tool

if TYPE_CHECKING:
    import numpy as np

Record = dict[str, Any]  # a line of metrics.jsonl
REMEMBERED: Kinds = {"key": str, "runs": dict}  # what trackers.json holds: our name for the run, and each tool's own


class Trackers:
    """Those that `train.report_to` names; used by the main process only."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        records: list[Record],
        since: int,
        tell: Callable[[str], None],
    ):
        """Open them, and catch up on `records`, all up to step `since`, after which the run goes on.

        Raises RecipeError if one of them cannot be opened, ArtefactError.
        """
        self.tell = tell
        self.tools: list[Tool] = []
        self.rows: dict[int, Row] = {}  # by step; not sent yet
        self.pictures: dict[tuple[int, str], np.ndarray] = {}
        if not recipe.train.trackers:
            return
        self._open(recipe, folder, since)
        for record in records:
            self.add(record)

    def _open(self, recipe: Recipe, folder: RunFolder, since: int) -> None:
        known = _remembered(folder)
        run = Following(recipe.train.project, folder, by_dotted_key(recipe.model_dump()), known["key"], since)
        write_json(folder.trackers, known)
        with ExitStack() as opened:
            for name in recipe.train.trackers:
                tool = TOOLS[name](run, known["runs"].get(name))
                try:
                    with redirect_stdout(StringIO()):  # which is for results
                        tool.open()
                except Exception as error:  # whatever a tool makes of a wrong key or a server that is away
                    raise RecipeError(f"train.report_to: {name}: {shortened(str(error))}") from None
                opened.callback(_close, tool)
                self.tools.append(tool)
                self.tell(f"{name:<9} {tool.where()}")
            opened.pop_all()
        known["runs"] |= {tool.name: tool.found for tool in self.tools if tool.found}
        write_json(folder.trackers, known)

    def add(self, record: Record) -> None:
        """More of its step may follow."""
        row = self.rows.setdefault(record["step"], {})
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                row[key] = int(value) if isinstance(value, bool) else value

    def picture(self, step: int, name: str, pixels: "np.ndarray") -> None:
        """(H, W, 3) uint8."""
        self.pictures[step, name] = pixels

    def send(self) -> None:
        """What was added; its steps are whole."""
        for tool in [*self.tools]:
            try:
                self._send(tool)
            except Exception as error:  # a server that went away must not end a training run
                self.tools.remove(tool)
                self.tell(f"{tool.name}: {shortened(str(error))}; training goes on without it, metrics.jsonl has all")
                _close(tool)
        self.rows, self.pictures = {}, {}

    def _send(self, tool: Tool) -> None:
        for step, row in self.rows.items():
            lacking = tool.lacks(step, row)
            if lacking:
                tool.log(step, lacking)
        for (step, name), pixels in self.pictures.items():
            if step > tool.held:
                tool.show(step, name, pixels)

    def close(self) -> None:
        """Steps that are not whole wait for the run to be resumed."""
        for tool in self.tools:
            _close(tool)


def _close(tool: Tool) -> None:
    with suppress(Exception), redirect_stdout(StringIO()):
        tool.close()


def _remembered(folder: RunFolder) -> dict[str, Any]:
    if not folder.trackers.exists():
        return {"key": uuid.uuid4().hex, "runs": {}}
    try:
        return check_kinds(read_object(folder.trackers), REMEMBERED)
    except Damaged as error:
        raise RecipeError(f"{folder.trackers}: {error}; move it away to begin new tracked runs") from None


def by_dotted_key(value: Any, at: str = "") -> dict[str, Any]:
    """Numbers, true and false as they are, everything else as text: what every tool can show."""
    if isinstance(value, dict) and value:
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= by_dotted_key(inner, f"{at}.{key}" if at else key)
        return found
    return {at: value if isinstance(value, int | float) else str(value)}
