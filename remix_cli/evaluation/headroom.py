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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remix_cli.core import routing
from remix_cli.core.trace import Trace
from remix_cli.data.batches import Batch, collate
from remix_cli.data.chunks import in_chunks, start_size
from remix_cli.data.rows import EncodedRow
from remix_cli.errors import RecipeError
from remix_cli.evaluation.statistics import Score, paired_difference, ratio
from remix_cli.models import batch_losses
from remix_cli.runs import LoadedRun, load_run
from remix_cli.storage import write_json
from remix_cli.stored_json import Document, check_kinds

DRAWS = 8
ROWS = 256  # looked at by default
FORCED = 1e6  # on top of a logit, it decides the choice
PASSES = 3 + 2 * DRAWS

# Two of the choices, by which the verdict goes.
SHUFFLED = "another token's set"
BEST_TOGETHER = f"best of {DRAWS} draws, all blocks"


@dataclass(frozen=True)
class Choice:
    """One way to choose the LoRAs: its loss in nats per token, and how much more than the top k's that is."""

    name: str
    loss: Score
    difference: Score | None  # None for the top k itself

    def to_dict(self) -> Document:
        difference = None if self.difference is None else _score_document(self.difference)
        return {"choice": self.name, "loss": _score_document(self.loss), "difference": difference}

    @classmethod
    def from_dict(cls, document: Any, rows: int) -> "Choice":
        found = check_kinds(document, {"choice": str, "loss": dict, "difference": dict | None})
        difference = found["difference"]
        if difference is not None:
            difference = _read_score(difference, rows)
        return cls(found["choice"], _read_score(found["loss"], rows), difference)


@dataclass(frozen=True)
class Headroom:
    """What `remix route-stats --headroom` finds on `rows` rows: every choice, the top k first."""

    rows: int
    choices: list[Choice]

    @property
    def verdict(self) -> str:
        """What the figures mean, in words."""
        shuffled, best = self._difference(SHUFFLED), self._difference(BEST_TOGETHER)
        if shuffled.low > 0:
            carries = (
                f"Which LoRAs serve which token matters here: with sets shuffled among tokens the loss is "
                f"{shuffled.value:.4f} higher ({shuffled.low:.4f} to {shuffled.high:.4f})."
            )
        else:
            carries = (
                "Which LoRAs serve which token makes no clear difference here: one LoRA of rank k r would do as well."
            )
        left = (
            f"The best of {DRAWS} draws for each row, picked with its answer in sight, gains {-best.value:.4f}: no "
            "router that has not seen the answers will gain as much by choosing among such draws."
        )
        return f"{carries} {left}"

    def _difference(self, name: str) -> Score:
        (difference,) = (choice.difference for choice in self.choices if choice.name == name)
        assert difference is not None
        return difference

    def to_dict(self) -> Document:
        choices = [choice.to_dict() for choice in self.choices]
        return {"verdict": self.verdict, "rows": self.rows, "draws": DRAWS, "choices": choices}

    @classmethod
    def from_dict(cls, document: Any) -> "Headroom":
        found = check_kinds(document, {"rows": int, "choices": list})
        return cls(found["rows"], [Choice.from_dict(choice, found["rows"]) for choice in found["choices"]])


def _score_document(score: Score) -> dict[str, float]:
    return {"value": score.value, "low": score.low, "high": score.high}


def _read_score(document: Any, rows: int) -> Score:
    found = check_kinds(document, {"value": int | float, "low": int | float, "high": int | float})
    return Score(found["value"], found["low"], found["high"], rows, share=False)


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


Noise = Callable[[Batch, tuple[int, int], Tensor], Tensor]  # batch, (B, T or 1), row ids -> (L, B, T or 1, n)


def headroom(run: LoadedRun, rows: list[EncodedRow], batch_size: int, advance: Callable[[int], None]) -> Headroom:
    """Every choice on `rows`. For adapters that sample; `advance` hears of rows done, PASSES each."""
    adapter, seed = run.adapter, run.recipe.seed
    tokens = np.array([int(row.supervised[1:].sum()) for row in rows], dtype=float)
    nats, sets = _top(run, rows, batch_size, advance)
    generator = torch.Generator().manual_seed(seed)
    blocks = len(adapter.routers)

    def commonest(batch: Batch, shape: tuple[int, int], ids: Tensor) -> Tensor:
        return torch.stack([s.commonest.expand(*shape, -1) for s in sets]) * FORCED

    def shuffled(batch: Batch, shape: tuple[int, int], ids: Tensor) -> Tensor:
        return torch.stack([s.drawn(shape, generator) for s in sets]) * FORCED

    def drawn(draw: int) -> Noise:
        return lambda batch, shape, ids: adapter.noise((seed, draw), ids, batch.input_ids.shape[1])

    def drawn_in_one(draw: int) -> Noise:
        """Each row draws in a block of its own, all blocks alike often, and takes the top k elsewhere."""

        def noise(batch: Batch, shape: tuple[int, int], ids: Tensor) -> Tensor:
            own = torch.arange(blocks, device=ids.device)[:, None] == (ids % blocks)  # (L, B)
            return drawn(draw)(batch, shape, ids) * own[:, :, None, None]

        return noise

    def losses(noise: Noise) -> np.ndarray:
        return _losses(run, rows, batch_size, advance, noise)

    together = np.stack([losses(drawn(draw)) for draw in range(DRAWS)])  # (DRAWS, rows)
    in_one = np.stack([losses(drawn_in_one(draw)) for draw in range(DRAWS)])
    others = {
        "one set for all tokens": losses(commonest),
        SHUFFLED: losses(shuffled),
        "drawn, mean": together.mean(0),
        BEST_TOGETHER: np.minimum(together.min(0), nats),
        f"best of {DRAWS} draws, one block": np.minimum(in_one.min(0), nats),
    }
    top = np.stack([nats, tokens])
    choices = [Choice("the top k", ratio(nats, tokens, share=False), None)]
    for name, values in others.items():
        difference = paired_difference(top, np.stack([values, tokens]), share=False)
        choices.append(Choice(name, ratio(values, tokens, share=False), difference))
    return Headroom(len(rows), choices)


def measure_headroom(
    path: Path,
    data: str | None,
    limit: int | None,
    *,
    best: bool = False,
    any_base: bool = False,
    progress: Callable[[str, int], Any],
) -> Headroom:
    """Of the run at `path`, on its held-out rows or those of the file `data`, at most `limit` (None: ROWS). Written to
    the run's folder. Raises RecipeError for a run that chooses nothing, DataError, ArtefactError."""
    run = load_run(path, best=best, any_base=any_base)
    config = run.adapter.config
    if not config.samples:
        raise RecipeError(f"{path}: {config.method}, {config.active} of {config.pool_size}: no choice to compare with")
    rows = run.rows_to_look_at(data, limit or ROWS)
    size = start_size(run.recipe.eval.batch_size, run.device)
    found = headroom(run, rows, size, progress("headroom", PASSES * len(rows)).advance)
    write_json(run.folder.statistics / f"headroom-{run.which}.json", found.to_dict())
    return found


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
    noise: Noise,
) -> np.ndarray:
    """Each row's nats when the noise is added to the logits."""
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
