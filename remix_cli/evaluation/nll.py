"""Held-out loss: cross-entropy per supervised token."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from remix_cli.core.patch import Adapter
from remix_cli.core.trace import Trace
from remix_cli.data.batches import collate
from remix_cli.data.chunks import in_chunks
from remix_cli.data.rows import EncodedRow
from remix_cli.models import batch_losses


@dataclass
class RowLoss:
    """Sum of the token losses of one row, in nats, and how many tokens that is."""

    nats: float
    tokens: int


def iter_row_losses(
    model: nn.Module,
    adapter: Adapter,
    rows: list[EncodedRow],
    batch_size: int,
    selection_seed: int | None = None,
    keys: list[int] | None = None,
) -> Iterator[tuple[int, RowLoss]]:
    """(row number, its loss), longest rows first, under top-k routing (of the base model while it is disabled).

    Rows are batched by length, which changes nothing but the time it takes. With a `selection_seed` the LoRAs are
    sampled as in training, by the row's entry in `keys` and position, instead of taking the top k.
    """
    device = next(model.parameters()).device

    @torch.no_grad()
    def measure(chunk: list[int]) -> list[float]:
        batch = collate([rows[i] for i in chunk]).to(device)
        noise = None
        if selection_seed is not None:
            ids = torch.tensor([keys[i] if keys else i for i in chunk], device=device)
            noise = adapter.noise((selection_seed,), ids, batch.input_ids.shape[1])
        with adapter.tracing(Trace(noise=noise, prompt=batch.prompt, record=False)):
            return batch_losses(model, batch).double().sum(-1).tolist()

    for chunk, losses in in_chunks([len(row.input_ids) for row in rows], batch_size, measure):
        for i, nats in zip(chunk, losses, strict=True):
            yield i, RowLoss(nats, int(rows[i].supervised[1:].sum()))


def row_losses(
    model: nn.Module,
    adapter: Adapter,
    rows: list[EncodedRow],
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> list[RowLoss]:
    """The loss of every row, in the rows' order, by `iter_row_losses`; the model's mode is restored."""
    was_training = model.training
    model.eval()
    results: list[RowLoss] = [RowLoss(0.0, 0)] * len(rows)
    for i, loss in iter_row_losses(model, adapter, rows, batch_size):
        results[i] = loss
        if advance:
            advance(1)
    model.train(was_training)
    return results


def mean_loss(rows: list[RowLoss]) -> float:
    """Nats per supervised token: all nats over all tokens, so long answers weigh more than short ones."""
    return sum(r.nats for r in rows) / sum(r.tokens for r in rows)
