"""Work that others wrote (a chat template, say) ends within a time and a memory, in this very process.

A time alone is no bound, as one multiplication can fill the memory; nor is a check of sizes, as there are many ways to
make a long string.
"""

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


class LimitError(Exception):
    """The work took more than it was allowed."""


class _Late(BaseException):
    """No `except Exception` on the way stops it."""


def within(seconds: float, size: int, work: Callable[[], Result]) -> Result:
    """What `work` gives, if it needs at most `seconds` of this thread's time and `size` more bytes. Raises LimitError.

    The time is kept on the main thread only, which alone hears signals; the memory where the system says what is
    in use (Linux).
    """
    if threading.current_thread() is not threading.main_thread():
        return _within_memory(size, work)
    end = time.thread_time() + seconds
    working = True

    def ring(*_: Any) -> None:
        if not working:
            return
        left = end - time.thread_time()  # the clock also runs while others compute, or the machine sleeps
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.1))  # once more, should a finaliser swallow this one
        if left <= 0:
            raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
        return _within_memory(size, work)
    except _Late:
        raise LimitError("too long") from None
    finally:
        working = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _within_memory(size: int, work: Callable[[], Result]) -> Result:
    try:
        with _address_space(size):
            return work()
    except MemoryError:
        raise LimitError(f"more than {size / 1e6:.0f} MB of memory") from None


@contextlib.contextmanager
def _address_space(size: int) -> Iterator[None]:
    used = Path("/proc/self/statm")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if not used.exists():
        yield
        return
    limit = int(used.read_text().split()[0]) * resource.getpagesize() + size
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
