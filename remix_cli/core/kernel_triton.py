"""The Triton program behind kernel.py; importable only where triton is installed."""

import triton
import triton.language as tl


# fmt: off
@triton.jit
def route(
    x_ptr, weight_ptr, noise_ptr, logits_ptr, length_ptr, chosen_ptr, weights_ptr, gates_ptr, tokens, width, scale,
    N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr,
    SAMPLED: tl.constexpr, UNIT: tl.constexpr, RECORD: tl.constexpr,
    PADDED: tl.constexpr, PADDED_RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """ROWS tokens of x (tokens, width); everything contiguous, N of the PADDED columns real.

    Without RECORD only the gates are written.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lora = tl.arange(0, PADDED)
    column = tl.arange(0, COLUMNS)
    real_row = row < tokens
    # One sum for each column of a piece, added up at the end: a reduction in every turn would be most of the time.
    products = tl.zeros((ROWS, PADDED, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        here = start + column
        inside = here < width
        x = tl.load(
            x_ptr + row[:, None].to(tl.int64) * width + here[None, :],
            mask=real_row[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        p = tl.load(
            weight_ptr + lora[:, None] * width + here[None, :],
            mask=(lora < N)[:, None] & inside[None, :],
            other=0.0,
        )
        products += x[:, None, :] * p[None, :, :]
        squares += x * x
    length = tl.full((ROWS,), 1.0, tl.float32)
    if UNIT:
        length = tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), 1e-12)
    logits = tl.sum(products, axis=2) / length[:, None]
    place = row[:, None] * N + lora[None, :]
    real = real_row[:, None] & (lora < N)[None, :]
    if RECORD:
        tl.store(logits_ptr + place, logits, mask=real)
        tl.store(length_ptr + row, length, mask=real_row)
    score = logits
    if SAMPLED:
        score += tl.load(noise_ptr + place, mask=real, other=0.0)
    # A NaN ranks last, so that the ids are valid and it is the loss that tells.
    score = tl.where((lora < N)[None, :] & (score == score), score, float("-inf"))
    mine, theirs = score[:, :, None], score[:, None, :]
    ahead = (theirs > mine) | ((theirs == mine) & (lora[None, None, :] < lora[None, :, None]))
    rank = tl.sum(ahead.to(tl.int32), axis=2)
    active = (rank < K) & real
    weight = tl.where(active, scale, 0.0)
    if RECORD:
        tl.store(chosen_ptr + row[:, None] * K + rank, lora[None, :] + tl.zeros_like(rank), mask=active)
        tl.store(weights_ptr + place, weight, mask=real)
    of_rank = tl.arange(0, PADDED_RANK)[None, None, :]
    gate = weight[:, :, None] + tl.zeros((ROWS, PADDED, PADDED_RANK), tl.float32)
    tl.store(gates_ptr + place[:, :, None] * RANK + of_rank, gate, mask=real[:, :, None] & (of_rank < RANK))
