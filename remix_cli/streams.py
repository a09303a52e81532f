"""Standard input, output and error of a command: closed from the start, lost on the way, or full.

A verb that reports ends as soon as nobody reads it, as any Unix tool does. A verb that makes something goes on without
a console: what it makes lies in files. Standard error is never a reason to end.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from remix_cli.errors import RemixError, StorageError


class ReaderGone(RemixError):
    """Nobody reads standard output any more. There is nothing to say, and nobody to say it to."""

    exit_code = 141  # 128 + SIGPIPE, what a shell sees of a tool that the signal ended


# What moves a cursor, clears a screen, or turns the order of letters round; lone surrogates are bytes of a path.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")
# How a library's progress bar begins again, or goes up to another one: nothing else is in such a piece.
_BAR = re.compile(r"\r[^\x00-\x1f\x7f-\x9f]*|(\x1b\[A)*")


def visible(text: str) -> str:
    """The text with its control characters spelt out: no terminal obeys it. Line ends and tabs stay."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class Output:
    """A text stream that makes control characters visible and survives the loss of what is behind it.

    What the stream's encoding does not have is spelt out as well. `bars`: libraries may show progress bars.

    `elsewhere` None: the first failed write raises ReaderGone, or StorageError where it is no pipe that broke. A
    string: everything from then on is dropped, and the string, unless it is empty, is said once on standard error.
    """

    def __init__(self, stream: Any, elsewhere: str | None, bars: bool = False):
        self.stream, self.elsewhere, self.bars = stream, elsewhere, bars
        self.lost = False

    def write(self, text: str) -> int:
        self.pass_on(text if self.bars and _BAR.fullmatch(text) else visible(text))
        return len(text)

    def pass_on(self, text: str) -> None:
        """As it is, with control characters."""
        if not self.lost:
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                self.pass_on(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except OSError as error:
                self._lose(error)

    @property
    def as_it_is(self) -> "AsItIs":
        """For those who vouch for the control characters that they write."""
        return AsItIs(self)

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


class AsItIs:
    """An Output that nothing is made visible in."""

    def __init__(self, output: Output):
        self.output = output

    def write(self, text: str) -> int:
        self.output.pass_on(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.output, name)


@contextmanager
def guarded(elsewhere: str | None = None) -> Iterator[None]:
    """sys.stdin, stdout and stderr exist and fail only as `Output` says; afterwards they are what they were."""
    before = sys.stdin, sys.stdout, sys.stderr
    _open_closed()
    sys.stdout, sys.stderr = Output(sys.stdout, elsewhere), Output(sys.stderr, "", bars=True)
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
    sys.stdout, sys.stderr = Output(sys.stdout, ""), Output(sys.stderr, "", bars=True)


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
