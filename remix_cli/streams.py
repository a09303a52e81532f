"""Standard input, output and error of a command: closed from the start, lost on the way, or full.

A verb that reports ends as soon as nobody reads it, as any Unix tool does. A verb that makes something goes on without
a console: what it makes lies in files. Standard error is never a reason to end.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from remix_cli.errors import RemixError, StorageError


class ReaderGone(RemixError):
    """Nobody reads standard output any more. There is nothing to say, and nobody to say it to."""

    exit_code = 141  # 128 + SIGPIPE, what a shell sees of a tool that the signal ended


class Output:
    """A text stream that survives the loss of what is behind it.

    `elsewhere` None: the first failed write raises ReaderGone, or StorageError where it is no pipe that broke. A
    string: everything from then on is dropped, and the string, unless it is empty, is said once on standard error.
    """

    def __init__(self, stream: Any, elsewhere: str | None):
        self.stream, self.elsewhere = stream, elsewhere
        self.lost = False

    def write(self, text: str) -> int:
        if not self.lost:
            try:
                self.stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if not self.lost:
            try:
                self.stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = True
        _to_nowhere(self.stream)
        if self.elsewhere is None:
            if error.errno == errno.EPIPE:
                raise ReaderGone from None
            raise StorageError(f"standard output: {error.strerror or error}; write it elsewhere") from None
        if self.elsewhere:
            print(f"warning: standard output: {error.strerror or error}; {self.elsewhere}", file=sys.stderr, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def guarded(elsewhere: str | None = None) -> Iterator[None]:
    """sys.stdin, stdout and stderr exist and fail only as `Output` says; afterwards they are what they were."""
    before = sys.stdin, sys.stdout, sys.stderr
    _open_closed()
    sys.stdout, sys.stderr = Output(sys.stdout, elsewhere), Output(sys.stderr, "")  # type: ignore[assignment]
    try:
        yield
    finally:
        outlive("")  # an error that is on its way says more than the loss of the last lines
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def outlive(elsewhere: str) -> None:
    """From here on the loss of standard output ends nothing; `elsewhere` tells the user what happens instead."""
    if isinstance(sys.stdout, Output):
        sys.stdout.elsewhere = elsewhere


def outlive_both() -> None:
    """A worker process never ends for want of a console."""
    sys.stdout, sys.stderr = Output(sys.stdout, ""), Output(sys.stderr, "")  # type: ignore[assignment]


def _open_closed() -> None:
    """/dev/null in place of what the shell closed (`>&-`).

    Otherwise the next file that is opened, a checkpoint for example, becomes standard output for everyone who writes
    there without asking Python.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            os.set_inheritable(nowhere, True)
    sys.stdin = sys.stdin or _nothing("r")
    sys.stdout = sys.stdout or _nothing("w")
    sys.stderr = sys.stderr or _nothing("w")


def _nothing(mode: str) -> Any:
    return open(os.devnull, mode, encoding="utf-8")


def _to_nowhere(stream: Any) -> None:
    """So that what is left in its buffer, and what others write there, fails no more."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # a stream of a test's or a notebook's own
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
