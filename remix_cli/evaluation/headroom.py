"""What routing by token is worth on given rows, and what a better choice could still gain there.

The loss under the top k is compared, row by row, with the loss under other choices of the same number of LoRAs:

- the commonest set of each block for every token: what is left if nothing depends on the token;
- each token the set of another token, drawn by how often the block uses it: equal use, but at random;
- drawn from the routers, as in training: what sampling costs;
- the best of several draws for each row, in all blocks at once, or in one block with the top k elsewhere. Whoever
  picks that has seen the row's answer, so it is more than any router can reach: if even this gains little, there is
  little left to learn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remix_cli.core import routing
from remix_cli.core.trace import Trace
from remix_cli.data.batches import Batch, collate
from remix_cli.data.chunks import in_chunks
from remix_cli.data.encode import EncodedRow
from remix_cli.evaluation.statistics import Score, paired_difference, ratio
from remix_cli.models import batch_losses
from remix_cli.runs import LoadedRun

DRAWS = 8
ROWS = 256  # looked at by default
FORCED = 1e6  # on top of a logit, it decides the choice
PASSES = 3 + 2 * DRAWS


@dataclass(frozen=True)
class Choice:
    """One way to choose the LoRAs: its loss in nats per token, and how much more than the top k's that is."""

    name: str
    loss: Score
    difference: Score | None  # None for the top k itself


@dataclass(frozen=True)
class Sets:
    """The sets that one block uses: `masks` (U, n) bool and `shares` (U,) of the tokens."""

    masks: Tensor
    shares: Tensor

    @property
    def commonest(self) -> Tensor:
        return self.masks[self.shares.argmax()]

    def drawn(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """(B, T, n) bool: for each position one set, by its share."""
        picked = torch.multinomial(self.shares, shape[0] * shape[1], replacement=True, generator=generator)
        return self.masks[picked.to(self.masks.device)].unflatten(0, shape)


def headroom(run: LoadedRun, rows: list[EncodedRow], batch_size: int, advance: Callable[[int], None]) -> list[Choice]:
    """Every choice on `rows`, the top k first. For adapters that sample; `advance` hears of rows done, PASSES each."""
    adapter, seed = run.adapter, run.recipe.seed
    tokens = np.array([int(row.supervised[1:].sum()) for row in rows], dtype=float)
    nats, sets = _top(run, rows, batch_size, advance)
    generator = torch.Generator().manual_seed(seed)
    blocks = len(adapter.routers)

    def commonest(batch: Batch, shape: tuple[int, int], ids: Tensor) -> Tensor:
        return torch.stack([s.commonest.expand(*shape, -1) for s in sets]) * FORCED

    def shuffled(batch: Batch, shape: tuple[int, int], ids: Tensor) -> Tensor:
        return torch.stack([s.drawn(shape, generator) for s in sets]) * FORCED

    def drawn(draw: int) -> Callable[[Batch, tuple[int, int], Tensor], Tensor]:
        return lambda batch, shape, ids: adapter.noise((seed, draw), ids, batch.input_ids.shape[1])

    def drawn_in_one(draw: int) -> Callable[[Batch, tuple[int, int], Tensor], Tensor]:
        """Each row draws in a block of its own, all blocks alike often, and takes the top k elsewhere."""

        def noise(batch: Batch, shape: tuple[int, int], ids: Tensor) -> Tensor:
            own = torch.arange(blocks, device=ids.device)[:, None] == (ids % blocks)
            return drawn(draw)(batch, shape, ids) * own[:, :, None, None]

        return noise

    def losses(noise: Callable[[Batch, tuple[int, int], Tensor], Tensor]) -> np.ndarray:
        return _losses(run, rows, batch_size, advance, noise)

    together = np.stack([losses(drawn(draw)) for draw in range(DRAWS)])  # (DRAWS, rows)
    in_one = np.stack([losses(drawn_in_one(draw)) for draw in range(DRAWS)])
    found = {
        "the top k": nats,
        "one set for all tokens": losses(commonest),
        "another token's set": losses(shuffled),
        "drawn, mean": together.mean(0),
        f"best of {DRAWS} draws, all blocks": np.minimum(together.min(0), nats),
        f"best of {DRAWS} draws, one block": np.minimum(in_one.min(0), nats),
    }
    choices = []
    for name, values in found.items():
        difference = None if values is nats else paired_difference(np.stack([nats, tokens]), np.stack([values, tokens]))
        choices.append(Choice(name, ratio(values, tokens, share=False), difference))
    return choices


def headroom_verdict(choices: list[Choice]) -> str:
    """What the figures mean, in words."""
    by_name = {choice.name: choice.difference for choice in choices}
    shuffled, best = by_name["another token's set"], by_name[f"best of {DRAWS} draws, all blocks"]
    assert shuffled is not None
    assert best is not None
    if shuffled.low > 0:
        carries = (
            f"Which LoRAs serve which token matters here: with sets shuffled among tokens the loss is "
            f"{shuffled.value:.4f} higher ({shuffled.low:.4f} to {shuffled.high:.4f})."
        )
    else:
        carries = "Which LoRAs serve which token makes no clear difference here: one LoRA of rank k r would do as well."
    left = (
        f"The best of {DRAWS} draws for each row, picked with its answer in sight, gains {-best.value:.4f}: no router "
        "that has not seen the answers will gain as much by choosing among such draws."
    )
    return f"{carries} {left}"


@torch.no_grad()
def _top(
    run: LoadedRun, rows: list[EncodedRow], batch_size: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, list[Sets]]:
    """Each row's nats under the top k, and the sets that each block uses over all real tokens."""
    seen: dict[str, list[Tensor]] = {name: [] for name in run.adapter.routers}
    pool_size = run.adapter.config.pool_size

    def work(chunk: list[int]) -> tuple[list[float], dict[str, Tensor]]:
        batch = collate([rows[i] for i in chunk]).to(run.device)
        with run.adapter.tracing(Trace(prompt=batch.prompt)) as trace:
            losses = batch_losses(run.model, batch).double().sum(-1).tolist()
        active = {}
        for name, decision in trace.decisions.items():
            chosen = decision.chosen.expand(*batch.mask.shape, -1)[batch.mask]
            active[name] = routing.selection_mask(chosen, pool_size)
        return losses, active

    nats = np.zeros(len(rows))
    for chunk, (losses, active) in in_chunks([len(row.input_ids) for row in rows], batch_size, work):
        nats[chunk] = losses
        for name, masks in active.items():
            seen[name].append(masks)
        advance(len(chunk))
    sets = []
    for parts in seen.values():
        masks, counts = torch.cat(parts).unique(dim=0, return_counts=True)
        sets.append(Sets(masks, (counts / counts.sum()).cpu()))
    return nats, sets


@torch.no_grad()
def _losses(
    run: LoadedRun,
    rows: list[EncodedRow],
    batch_size: int,
    advance: Callable[[int], None],
    noise: Callable[[Batch, tuple[int, int], Tensor], Tensor],
) -> np.ndarray:
    """Each row's nats when `noise(batch, (B, T or 1), row ids)` (L, B, T or 1, n) is added to the logits."""
    by_sequence = run.adapter.config.level == "sequence"

    def work(chunk: list[int]) -> list[float]:
        batch = collate([rows[i] for i in chunk]).to(run.device)
        shape = (len(chunk), 1 if by_sequence else batch.input_ids.shape[1])
        added = noise(batch, shape, torch.tensor(chunk, device=run.device))
        with run.adapter.tracing(Trace(noise=added, prompt=batch.prompt, record=False)):
            return batch_losses(run.model, batch).double().sum(-1).tolist()

    nats = np.zeros(len(rows))
    for chunk, losses in in_chunks([len(row.input_ids) for row in rows], batch_size, work):
        nats[chunk] = losses
        advance(len(chunk))
    return nats


def headroom_document(choices: list[Choice], rows: int) -> dict[str, Any]:
    def score(one: Score | None) -> dict[str, float] | None:
        return None if one is None else {"value": one.value, "low": one.low, "high": one.high}

    listed = [{"choice": c.name, "loss": score(c.loss), "difference": score(c.difference)} for c in choices]
    return {"verdict": headroom_verdict(choices), "rows": rows, "draws": DRAWS, "choices": listed}
