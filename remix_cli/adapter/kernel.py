"""A router's whole forward pass as one GPU kernel: scores, their scaling, the choice of k and the weights.

The eager code in layer.py is the reference and says what is computed; it takes about ten launches a router and
reads the input three times, this reads it once. Only n numbers a token leave the kernel.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

MAX_POOL = 64  # LoRAs that one program scores at once
COLUMNS = 256  # of the input, read at a time

AVAILABLE = importlib.util.find_spec("triton") is not None


class Choice(NamedTuple):
    """What a router decides for each position: see `trace.Decision`."""

    logits: Tensor  # (..., n) float32
    length: Tensor  # (..., 1) float32, what the scores were divided by
    chosen: Tensor  # (..., k) int64, best first
    weights: Tensor  # (..., n), `scale` for the chosen and 0 for the rest


def serves(x: Tensor, pool_size: int) -> bool:
    """Can the kernel take this input? float64 and large pools go by the eager code."""
    small = x.dtype in (torch.bfloat16, torch.float16, torch.float32) and pool_size <= MAX_POOL
    return AVAILABLE and x.is_cuda and small


def choose(
    x: Tensor, weight: Tensor, noise: Tensor | None, active: int, scale: float, unit: bool, dtype: torch.dtype
) -> Choice:
    """Choose `active` of n LoRAs for each position of x (..., D) by weight (n, D) float32.

    `noise` (..., n) is added to the scores for the choice, not to the logits returned; `unit` divides the scores
    by |x|; the weights come in `dtype`. Equal scores go to the lower index.
    """
    if not AVAILABLE:
        raise RuntimeError("the routing kernel needs triton")
    import triton

    from remix_cli.adapter.kernel_triton import route

    *leading, width = x.shape
    n = weight.shape[0]
    flat = x.reshape(-1, width).contiguous()
    tokens = flat.shape[0]
    logits = torch.empty(tokens, n, dtype=torch.float32, device=x.device)
    length = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    chosen = torch.empty(tokens, active, dtype=torch.int64, device=x.device)
    weights = torch.empty(tokens, n, dtype=dtype, device=x.device)
    padded = triton.next_power_of_2(n)
    rows = max(1, 32 // padded)
    route[(triton.cdiv(tokens, rows),)](
        flat,
        weight.contiguous(),
        logits if noise is None else noise.reshape(-1, n).contiguous(),
        logits,
        length,
        chosen,
        weights,
        tokens,
        width,
        scale,
        N=n,
        K=active,
        SAMPLED=noise is not None,
        UNIT=unit,
        PADDED=padded,
        ROWS=rows,
        COLUMNS=COLUMNS,
    )
    shaped = (part.view(*leading, part.shape[-1]) for part in (logits, length, chosen, weights))
    return Choice(*shaped)
