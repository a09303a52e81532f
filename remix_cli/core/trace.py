"""The one way in and out of the routers during a forward pass.

A `Trace` says how the routers choose (draw with given noise, take the top k, repeat an earlier pass) and
collects what they chose. Nothing is drawn inside a forward pass: the noise is fixed when the trace is made,
so a recomputation under activation checkpointing repeats the same selections.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from remix_cli.core.routing import fold, gumbel_noise

# Whole numbers, on the host or, so that a recorded step can draw anew, on the device.
Seed = tuple[int | Tensor, ...]


class Weighting(NamedTuple):
    """What the pools of one block are weighted by."""

    gates: Tensor  # (B, T or 1, n r), each LoRA's weight once for each of its r columns, in the computation's type
    weights: Tensor | None  # (B, T or 1, n), where the backward pass is to leave a gradient by LoRA


@dataclass
class Decision:
    """What one router did in one forward pass."""

    # With `level: sequence` T is 1: one decision for the whole sequence.
    inputs: Tensor  # x, (B, T, D), detached: the router's gradient is formed from it once the losses are known
    logits: Tensor  # (B, T, n) float32, detached
    length: Tensor  # (B, T, 1), what P x was divided by to give the logits: |x|, or 1
    chosen: Tensor  # ids of the k active LoRAs, (B, T, k), in order of preference or of drawing
    weights: Tensor  # what the pool was weighted by, (B, T, n)
    gates: Tensor  # the same for each column of a stacked pool, (B, T, n r)
    live: Tensor | None = None  # the logits with their graph, under a soft rule: a balance loss is made from them

    @property
    def weighting(self) -> Weighting:
        return Weighting(self.gates, self.weights if self.weights.requires_grad else None)


@dataclass
class Trace:
    """How the routers choose during one forward pass, and what they chose.

    `noise` (routers, B, T, n): choose by the top k of logits + noise, that is, draw from q without
    replacement; None: top k of the logits. `selection_grad`: let the backward pass leave dL/dz in each
    decision's `weights.grad`. `prompt` (B, T) bool: the positions that routing by sequence chooses from.
    `record`: keep every decision, for one forward pass; False keeps none. `replay`: repeat that trace's mode
    and selections, recording nothing. `quantise`: False, to find the clusters, lets routers with `clusters` read the
    prompt's mean itself.
    """

    noise: Tensor | None = None
    selection_grad: bool = False
    prompt: Tensor | None = None
    record: bool = True
    replay: Trace | None = None
    quantise: bool = True
    decisions: dict[str, Decision] = field(default_factory=dict)
    kept: dict[str, Weighting] = field(default_factory=dict)  # in force for a whole generation, by router

    def add(self, router: str, decision: Decision) -> None:
        if router in self.decisions:
            raise RuntimeError(f"router {router} ran twice under one trace; use one trace per forward pass")
        self.decisions[router] = decision


class RoutingState:
    """The cell through which all routers of one adapter see the current trace."""

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self.off = False  # while the adapter is disabled no router need choose
        self.casts: dict[int, Tensor] | None = None

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """A promise that no adapter parameter changes inside: each is cast to the computation's type only once.

        A scope rather than a check of what has changed, because fused optimizers change parameters unseen.
        """
        before = self.casts
        if before is None:
            self.casts = {}
        try:
            yield
        finally:
            self.casts = before

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """`parameter`, detached, in another type."""
        if self.casts is None or parameter.dtype == dtype:
            return parameter.detach().to(dtype)
        cast = self.casts.get(id(parameter))
        if cast is None or cast.dtype != dtype:
            cast = parameter.detach().to(dtype)
            self.casts[id(parameter)] = cast
        return cast

    @contextmanager
    def tracing(self, trace: Trace) -> Iterator[Trace]:
        """Run the forward passes inside under `trace`. Without one, routers take the top k and keep nothing."""
        before = self.trace
        self.trace = trace
        try:
            yield trace
        finally:
            self.trace = before

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` for torch.utils.checkpoint (non-reentrant): the recomputation replays this trace."""
        if self.trace is None:
            return nullcontext(), nullcontext()
        return nullcontext(), self.tracing(Trace(replay=self.trace))


def position_keys(seed: Seed, rows: Tensor, length: int) -> Tensor:
    """One int64 key per position, (B, T), from whole numbers `seed`, row ids (B,) and the position index.

    Give rows ids that are unique within a step, whatever rank or micro-batch they land in: the draws then
    do not depend on how the batch was split.
    """
    key = torch.zeros_like(rows)
    for part in seed:
        key = fold(key, part)
    positions = torch.arange(length, device=rows.device)
    return fold(fold(key, rows).unsqueeze(-1), positions)


def selection_noise(seed: Seed, rows: Tensor, length: int, routers: int, pool_size: int) -> Tensor:
    """The noise of one sampled forward pass, (routers, B, T, n) float32, for `Trace(noise=...)`."""
    return gumbel_noise(position_keys(seed, rows, length), routers, pool_size)
