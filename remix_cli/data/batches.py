"""Which rows make up which step, and how a micro-batch is laid out.

Everything here is a function of (seed, step): a resumed run, or the same run on more ranks, sees the same
rows in the same steps. A step's rows are cut into micro-batches first and the micro-batches are dealt to the
ranks, so two ranks without accumulation do what one rank does with two accumulated micro-batches.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from remix_cli.data.encode import EncodedRow

GROUP = 50  # steps whose rows are sorted by length together


@dataclass
class Batch:
    """One micro-batch: B right-padded sequences of T positions, with S supervised targets in all."""

    input_ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool: True where a real token stands
    prompt: Tensor  # (B, T) bool: True before the first supervised token
    positions: Tensor  # (S,) where the logits of the targets stand in the flattened (B * T)
    targets: Tensor  # (S,) token ids; targets[j] follows position positions[j]
    rows: Tensor  # (B,) row ids, unique within the step over all ranks
    first_row: int = 0  # rows[0], known without asking the device

    def to(self, device: torch.device) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS}
        return replace(self, **moved)


TENSORS = ("input_ids", "mask", "prompt", "positions", "targets", "rows")


def collate(rows: list[EncodedRow], first_row: int = 0) -> Batch:
    """Pad on the right. Under a causal mask no real position can see the padding, so none needs masking."""
    length = max(len(row.input_ids) for row in rows)
    length = -(-length // 8) * 8  # kernels like multiples of 8
    ids = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=bool)
    prompt = np.zeros((len(rows), length), dtype=bool)
    wanted = np.zeros((len(rows), length), dtype=bool)  # at the logit's position
    following = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        t = len(row.input_ids)
        ids[i, :t], mask[i, :t] = row.input_ids, True
        prompt[i, : max(1, int(row.supervised.argmax()))] = True
        following[i, : t - 1], wanted[i, : t - 1] = row.input_ids[1:], row.supervised[1:]
    positions = np.flatnonzero(wanted)
    return Batch(
        input_ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        prompt=torch.from_numpy(prompt),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(following.reshape(-1)[positions]),
        rows=torch.arange(first_row, first_row + len(rows)),
        first_row=first_row,
    )


@dataclass(frozen=True)
class Plan:
    """The order of training. `counts` and `weights` are per source, rows of a source standing together."""

    lengths: np.ndarray
    counts: tuple[int, ...]
    weights: tuple[float, ...]
    rows_per_step: int
    group_by_length: bool
    seed: int

    @property
    def rows_per_epoch(self) -> int:
        return sum(_repeats(n, w) for n, w in zip(self.counts, self.weights, strict=True))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self.rows_per_step)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of each step of this epoch; only the last step may be short."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self._rows(random))
        if self.group_by_length:
            block = GROUP * self.rows_per_step
            parts = [order[i : i + block] for i in range(0, len(order), block)]
            order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        steps = [order[i : i + self.rows_per_step] for i in range(0, len(order), self.rows_per_step)]
        whole = len(steps) - (len(steps[-1]) < self.rows_per_step)
        return [steps[i] for i in random.permutation(whole)] + steps[whole:]

    def _rows(self, random: np.random.Generator) -> np.ndarray:
        parts, start = [], 0
        for count, weight in zip(self.counts, self.weights, strict=True):
            whole, extra = divmod(_repeats(count, weight), count)
            rows = np.arange(start, start + count)
            parts += [rows] * whole + [random.permutation(rows)[:extra]]
            start += count
        return np.concatenate(parts)


def _repeats(count: int, weight: float) -> int:
    return max(1, round(count * weight))


def micro_batches(
    rows: np.ndarray, lengths: np.ndarray, size: int, rank: int, world: int
) -> list[tuple[int, np.ndarray]]:
    """This rank's micro-batches of a step: (id of the first row, row numbers), longest rows first."""
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    cuts = [(i, rows[i : i + size]) for i in range(0, len(rows), size)]
    return cuts[rank::world]
