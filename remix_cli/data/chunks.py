"""Work through many rows, longest first, as many at a time as memory holds."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from remix_cli.errors import is_out_of_memory

Result = TypeVar("Result")


def start_size(given: int | None, device: torch.device) -> int:
    """Rows to begin with where the recipe names no number: few on a CPU, where more at once is not faster."""
    return given or (256 if device.type == "cuda" else 16)


def in_chunks(
    lengths: Sequence[int], size: int, work: Callable[[list[int]], Result]
) -> Iterator[tuple[list[int], Result]]:
    """(row numbers, what `work` made of them) for all rows, longest first, at most `size` at a time.

    When memory runs out the chunk is halved and tried again, and later ones stay small; a single row that does not
    fit raises. Long rows first, so that it happens at the beginning or not at all.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        chunk = order[start : start + size]
        try:
            result = work(chunk)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(chunk) == 1:
                raise
            size = len(chunk) // 2
            result = None
        if result is None:  # outside of the handler, which holds on to the failed pass's tensors
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start += len(chunk)
        yield chunk, result
