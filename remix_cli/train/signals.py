"""SIGTERM and Ctrl-C during a run."""

import os
import signal
from typing import Any


class Signals:
    """SIGTERM and the first Ctrl-C ask for a checkpoint and an orderly end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "Signals":
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.received and number == signal.SIGINT:
            os._exit(130)
        self.received = number
