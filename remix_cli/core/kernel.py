"""A router's whole forward pass as one GPU kernel: scores, their scaling, the choice of k and the weights.

The eager code in router.py, with `rules.ConstantWeight`, is the reference and says what is computed; it takes about
ten launches a router and reads the input three times, this reads it once. Only n numbers a token leave the kernel.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

MAX_POOL = 64  # LoRAs that one program scores at once
SUMS = 8192  # that a program holds in registers: tokens x LoRAs x columns of the input read at a time
FEW = 64  # tokens up to which each has a program of its own, so that generation waits for few reads in a row

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
AVAILABLE = importlib.util.find_spec("triton") is not None


class Settings(NamedTuple):
    """How a router chooses, apart from its parameters."""

    active: int  # k
    scale: float  # weight of each chosen LoRA
    rank: int  # r, how often a LoRA's weight stands among the gates
    unit: bool  # divide the scores by |x|


class Choice(NamedTuple):
    """What a router decides for each position: see `trace.Decision`."""

    logits: Tensor  # (..., n) float32
    length: Tensor  # (..., 1) float32, what the scores were divided by
    chosen: Tensor  # (..., k) int64, best first
    weights: Tensor  # (..., n), `scale` for the chosen and 0 for the rest
    gates: Tensor  # (..., n r), the same r times each


def serves(x: Tensor, pool_size: int) -> bool:
    """Can the kernel take this input? float64 and large pools go by the eager code."""
    return AVAILABLE and x.is_cuda and x.dtype in _TYPES and pool_size <= MAX_POOL


def choose(
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    settings: Settings,
    gates_type: torch.dtype,
    weights_type: torch.dtype,
) -> Choice:
    """Choose k of n LoRAs for each position of x (..., D) by weight (n, D) float32.

    `noise` (..., n) is added to the scores for the choice, not to the logits returned. Equal scores go to the lower
    index. Raises RuntimeError without triton.
    """
    n = weight.shape[0]
    tokens = x.shape[:-1]
    where = x.device
    choice = Choice(
        logits=torch.empty(*tokens, n, dtype=torch.float32, device=where),
        length=torch.empty(*tokens, 1, dtype=torch.float32, device=where),
        chosen=torch.empty(*tokens, settings.active, dtype=torch.int64, device=where),
        weights=torch.empty(*tokens, n, dtype=weights_type, device=where),
        gates=torch.empty(*tokens, n * settings.rank, dtype=gates_type, device=where),
    )
    _launch(x, weight, noise, settings, choice.gates, choice)
    return choice


def choose_gates(x: Tensor, weight: Tensor, noise: Tensor | None, settings: Settings, dtype: torch.dtype) -> Tensor:
    """The gates of `choose` alone, (..., n r): all that inference needs, where a launch is most of the time."""
    gates = torch.empty(*x.shape[:-1], weight.shape[0] * settings.rank, dtype=dtype, device=x.device)
    _launch(x, weight, noise, settings, gates, None)
    return gates


def _launch(
    x: Tensor, weight: Tensor, noise: Tensor | None, settings: Settings, gates: Tensor, record: Choice | None
) -> None:
    """Fill `gates` and, if given, the rest of `record`."""
    if not AVAILABLE:
        raise RuntimeError("the routing kernel needs triton")
    from remix_cli.core.kernel_triton import route

    n, width = weight.shape
    flat = x.reshape(-1, width).contiguous()
    tokens = flat.shape[0]
    padded = _power_of_two(n)
    rows = 1 if tokens <= FEW else max(1, 32 // padded)
    unused = gates  # the program wants an address for everything, and leaves alone what it is not asked for
    route[(-(-tokens // rows),)](
        flat,
        weight.contiguous(),
        unused if noise is None else noise.reshape(-1, n).contiguous(),
        unused if record is None else record.logits,
        unused if record is None else record.length,
        unused if record is None else record.chosen,
        unused if record is None else record.weights,
        gates,
        tokens,
        width,
        settings.scale,
        N=n,
        K=settings.active,
        RANK=settings.rank,
        SAMPLED=noise is not None,
        UNIT=settings.unit,
        RECORD=record is not None,
        PADDED=padded,
        PADDED_RANK=_power_of_two(settings.rank),
        ROWS=rows,
        COLUMNS=min(SUMS // (rows * padded), _power_of_two(width)),
    )


def _power_of_two(number: int) -> int:
    """The next one, or `number` itself."""
    return 1 << (number - 1).bit_length()
