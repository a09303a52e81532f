"""How long a sweep still takes: from what its runs have taken so far, whatever each costs and however many at once.

A run's time is its work (train/run_size.py) times the seconds that a unit of work took in the latest run of its arm;
until one has ended, by the steps that it has logged; until there are some, as in the other arms. What was measured
before this command was given counts only until this one has measured something: the machine may have been busy then.
"""

import json
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from remix_cli.folders import RunFolder
from remix_cli.train.run_size import RunSize


@dataclass(frozen=True)
class Awaited:
    """A run that has not ended."""

    arm: str
    size: RunSize
    folder: Path | None = None  # None as long as its setting is not chosen


@dataclass(frozen=True)
class Logged:
    """Of a run in hand, its last line about a step."""

    step: int
    step_seconds: float


class Forecast:
    def __init__(self, processes: int):
        self.processes = processes
        self.awaited: dict[Hashable, Awaited] = {}
        self.scorings: Counter[str] = Counter()  # that are still to come, by arm
        self._runs: dict[str, tuple[float, float]] = {}  # by arm, of its latest run: seconds and work
        self._earlier: dict[str, tuple[float, float]] = {}  # of runs that were complete when this began
        self._scored: dict[str, tuple[float, int]] = {}  # by arm: seconds and how many

    def ran(self, arm: str, size: RunSize, seconds: float) -> None:
        """A run of the arm has ended well, now."""
        self._runs[arm] = (seconds, size.work)

    def had_run(self, arm: str, size: RunSize, seconds: float) -> None:
        """A run of the arm was there already."""
        before = self._earlier.get(arm, (0.0, 0.0))
        self._earlier[arm] = (before[0] + seconds, before[1] + size.work)

    @property
    def has_measured(self) -> bool:
        """Has this command measured anything itself?"""
        return any(work for _, work in self._of_arms(self._in_hand()).values())

    def scored(self, arm: str, seconds: float) -> None:
        before = self._scored.get(arm, (0.0, 0))
        self._scored[arm] = (before[0] + seconds, before[1] + 1)

    def seconds_of_run(self, arm: str, size: RunSize) -> float | None:
        """None if nothing has been measured yet."""
        return self._seconds(arm, size, self._in_hand())

    def seconds_of_scoring(self, arm: str) -> float:
        """0 as long as nothing has been scored."""
        seconds, count = self._scored.get(arm, (0.0, 0))
        if not count:
            seconds = sum(one for one, _ in self._scored.values())
            count = sum(many for _, many in self._scored.values())
        return seconds / count if count else 0.0

    @property
    def scores_unmeasured(self) -> bool:
        """Are there tasks to score, and nothing is known of how long that takes?"""
        return any(self.scorings.values()) and not self._scored

    def seconds_left(self) -> float | None:
        """None if nothing has been measured yet."""
        logged = self._in_hand()
        left = [0.0]
        for key, run in self.awaited.items():
            whole = self._seconds(run.arm, run.size, logged)
            if whole is None:
                return None
            share = logged[key].step / run.size.steps if key in logged and run.size.steps else 0.0
            left.append(whole * (1 - min(1.0, share)))
        for arm, count in self.scorings.items():
            left += [self.seconds_of_scoring(arm)] * count
        return max(sum(left) / self.processes, *left)

    def _seconds(self, arm: str, size: RunSize, logged: dict[Hashable, Logged]) -> float | None:
        """For the run from start to end, loading aside as long as none of its arm has ended."""
        if not size.work:  # nothing is trained
            return 0.0
        for of_arms in (self._of_arms(logged), self._earlier):
            known = [of_arms[arm]] if arm in of_arms else list(of_arms.values())
            work = sum(one for _, one in known)
            if work:
                return sum(seconds for seconds, _ in known) / work * size.work
        return None

    def _of_arms(self, logged: dict[Hashable, Logged]) -> dict[str, tuple[float, float]]:
        """Seconds and work by arm, as far as this command has measured them."""
        found = dict(self._runs)
        for key, line in logged.items():
            run = self.awaited[key]
            if run.arm not in found and run.size.steps:
                found[run.arm] = (line.step_seconds * run.size.steps, run.size.work)
        return found

    def _in_hand(self) -> dict[Hashable, Logged]:
        found = {}
        for key, run in self.awaited.items():
            logged = last_logged(run.folder) if run.folder else None
            if logged:
                found[key] = logged
        return found


def last_logged(folder: Path) -> Logged | None:
    """None if the run has logged no step, or another process is just writing the line."""
    try:
        lines = RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()
        for line in reversed(lines):
            found = json.loads(line)
            if "step_seconds" in found:
                return Logged(int(found["step"]), float(found["step_seconds"]))
    except (OSError, ValueError, TypeError, KeyError):  # a forecast is a courtesy
        return None
    return None


def in_words(seconds: float) -> str:
    """`40 s`, `14 min`, `2.3 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
