"""Which rows make up which step, and how a micro-batch is laid out.

Everything here is a function of (seed, step): a resumed run, or the same run on more ranks, sees the same
rows in the same steps. A step's rows are cut into micro-batches first and the micro-batches are dealt to the
ranks, so two ranks without accumulation do what one rank does with two accumulated micro-batches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from remix_cli.data.rows import EncodedRow

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
    weights: Tensor | None = None  # (S,) float32, of the targets' losses; 0 where one only fills up; None: all are 1

    def to(self, device: torch.device) -> "Batch":
        return self.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def in_few_shapes(self) -> "Batch":
        """The same batch, filled up to lengths and numbers of targets that many batches share.

        A target that fills up stands at a position that has none, and counts nothing.
        """
        b, t = self.input_ids.shape
        length = _up(t, LENGTHS)
        more = (0, length - t)
        positions = self.positions // t * length + self.positions % t
        free = torch.ones(b * length, dtype=torch.bool)
        free[positions] = False
        count = len(positions)
        wanted = min(_up(count, TARGETS), b * length)
        filler = free.nonzero().flatten()[: wanted - count]
        weights = torch.ones(count) if self.weights is None else self.weights
        return replace(
            self,
            input_ids=F.pad(self.input_ids, more),
            mask=F.pad(self.mask, more),
            prompt=F.pad(self.prompt, more),
            positions=torch.cat([positions, filler]),
            targets=torch.cat([self.targets, self.targets.new_zeros(len(filler))]),
            weights=torch.cat([weights, torch.zeros(len(filler))]),
        )


LENGTHS, TARGETS = 64, 512  # a batch in few shapes has multiples of these


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


TENSORS = ("input_ids", "mask", "prompt", "positions", "targets", "rows", "weights")


def rounded_up(length: int) -> int:
    """To what a batch of rows of at most this length is padded: kernels like multiples of 8."""
    return _up(length, 8)


def collate(rows: list[EncodedRow], first_row: int = 0, *, weighted: bool = False) -> Batch:
    """Pad on the right. Under a causal mask no real position can see the padding, so none needs masking.

    `weighted`: with the rows' weights, as training sees them.
    """
    length = max(len(row.input_ids) for row in rows)
    length = rounded_up(length)
    ids = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=bool)
    prompt = np.zeros((len(rows), length), dtype=bool)
    wanted = np.zeros((len(rows), length), dtype=bool)  # at the logit's position
    following = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        t = len(row.input_ids)
        ids[i, :t] = row.input_ids
        mask[i, :t] = True
        prompt[i, : max(1, int(row.supervised.argmax()))] = True
        following[i, : t - 1] = row.input_ids[1:]
        wanted[i, : t - 1] = row.supervised[1:]
    positions = np.flatnonzero(wanted)
    weights = None
    if weighted and any(row.weight != 1 for row in rows):
        of_rows = np.array([row.weight for row in rows], dtype=np.float32)
        weights = torch.from_numpy(of_rows[positions // length])
    return Batch(
        input_ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        prompt=torch.from_numpy(prompt),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(following.reshape(-1)[positions]),
        rows=torch.arange(first_row, first_row + len(rows)),
        first_row=first_row,
        weights=weights,
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
            sorted_blocks = []
            block = GROUP * self.rows_per_step
            for start in range(0, len(order), block):
                rows = order[start : start + block]
                sorted_blocks.append(rows[np.argsort(self.lengths[rows], kind="stable")])
            order = np.concatenate(sorted_blocks)
        steps = [order[i : i + self.rows_per_step] for i in range(0, len(order), self.rows_per_step)]
        short = [step for step in steps[-1:] if len(step) < self.rows_per_step]  # it stays the last
        whole = len(steps) - len(short)
        return [steps[i] for i in random.permutation(whole)] + short

    def _rows(self, random: np.random.Generator) -> np.ndarray:
        parts: list[np.ndarray] = []
        start = 0
        for count, weight in zip(self.counts, self.weights, strict=True):
            whole, extra = divmod(_repeats(count, weight), count)
            rows = np.arange(start, start + count)
            parts += [rows] * whole
            parts.append(random.permutation(rows)[:extra])
            start += count
        return np.concatenate(parts)


class Order:
    """A plan's rows step by step, whatever the epoch."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.epoch = -1
        self.steps: list[np.ndarray] = []  # of this epoch, worked out when its first step is asked for

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of a step, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.plan.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.steps = epoch, self.plan.epoch(epoch)
        return self.steps[index]


def _repeats(count: int, weight: float) -> int:
    return max(1, round(count * weight))


def micro_batches(
    rows: np.ndarray,
    lengths: np.ndarray,
    size: int,
    rank: int,
    world: int,
    equally_many: bool = False,
    tokens: int | None = None,
) -> list[tuple[int, np.ndarray, bool]]:
    """This rank's micro-batches of a step: (id of the first row, row numbers, does it count), longest rows first.

    Each has `size` rows, or with `tokens` as many as fit into so many padded positions. With `equally_many` a rank that
    has fewer than others ends with the step's first one, which does not count there.
    """
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    starts = range(0, len(rows), size) if tokens is None else starts_by_tokens(lengths[rows], tokens, world)
    ends = [*starts[1:], len(rows)]
    cuts = [(i, rows[i:end], True) for i, end in zip(starts, ends, strict=True)]
    mine = cuts[rank::world]
    if equally_many and len(mine) < len(cuts[::world]):
        first, part, _ = cuts[0]
        mine.append((first, part, False))
    return mine


def starts_by_tokens(lengths: np.ndarray, tokens: int, world: int) -> list[int]:
    """Where to cut rows of descending `lengths` so that no part takes more than `tokens` positions, padding counted.

    Of the ways that need no more rounds of `world` parts the one whose largest part is smallest, so that the ranks are
    busy equally long. A row that is longer than `tokens` is a part by itself.
    """
    rounds = -(-len(_full_parts(lengths, tokens)) // world)
    low, high = rounded_up(int(lengths[0])), max(tokens, rounded_up(int(lengths[0])))
    while low < high:
        middle = (low + high) // 2
        if len(_full_parts(lengths, middle)) <= rounds * world:
            high = middle
        else:
            low = middle + 1
    return _full_parts(lengths, high)


def _full_parts(lengths: np.ndarray, tokens: int) -> list[int]:
    """Where parts begin that are each as full as `tokens` positions allow."""
    starts = []
    start = 0
    while start < len(lengths):
        starts.append(start)
        start += max(1, tokens // rounded_up(int(lengths[start])))
    return starts
