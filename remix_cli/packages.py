"""Packages that others import without being asked. Standard library only."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def fetch_no_code() -> None:
    """Where `kernels` is installed, bitsandbytes and parts of transformers use it to fetch native code from the hub
    and run it, some as soon as they are imported. To them it is not installed."""
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


@contextmanager
def absent(name: str) -> Iterator[None]:
    """The package `name` cannot be found in this block, unless it has been imported before."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
