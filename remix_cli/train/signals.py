"""SIGTERM, SIGHUP and Ctrl-C during a run."""

import os
import signal
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # SIGHUP: the terminal or the connection has gone


class Signals:
    """The first of them asks for a checkpoint and an orderly end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received = 0
        self.before: dict[int, Any] = {}  # the handlers in whose place this stands

    def __enter__(self) -> "Signals":
        heeded = [s for s in ENDING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # under nohup
        self.before = {s: signal.signal(s, self._note) for s in heeded}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.received and number == signal.SIGINT:
            os._exit(130)
        self.received = number
