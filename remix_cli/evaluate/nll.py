"""Held-out loss: cross-entropy per supervised token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from remix_cli.adapter.patch import Adapter
from remix_cli.adapter.trace import Trace
from remix_cli.data.batches import collate
from remix_cli.data.encode import EncodedRow
from remix_cli.models import batch_losses


@dataclass
class RowLoss:
    """Sum of the token losses of one row, in nats, and how many tokens that is."""

    nats: float
    tokens: int


@torch.no_grad()
def row_losses(
    model: nn.Module,
    adapter: Adapter,
    rows: list[EncodedRow],
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> list[RowLoss]:
    """The loss of every row, in the rows' order, under top-k routing (of the base model while it is disabled).

    Rows are batched by length, which changes nothing but the time it takes.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    results: list[RowLoss] = [RowLoss(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = collate([rows[i] for i in chunk]).to(device)
        with adapter.tracing(Trace(prompt=batch.prompt, record=False)):
            losses = batch_losses(model, batch).double().sum(-1).tolist()
        for i, nats in zip(chunk, losses, strict=True):
            results[i] = RowLoss(nats, int(rows[i].supervised[1:].sum()))
        if advance:
            advance(len(chunk))
    model.train(was_training)
    return results


def mean_loss(rows: list[RowLoss]) -> float:
    """Nats per supervised token: all nats over all tokens, so long answers weigh more than short ones."""
    return sum(r.nats for r in rows) / sum(r.tokens for r in rows)
