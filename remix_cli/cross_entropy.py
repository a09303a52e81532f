"""Cross-entropy that never holds all logits in float32; autograd's own keeps two such copies of them."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 25  # logits widened at a time: 128 MiB


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats per row, (S,) float32 or wider, of logits (S, V) against targets (S,)."""
    return _TokenLosses.apply(logits, targets)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        totals = torch.cat([_wide(part).logsumexp(-1) for part in logits.split(_rows(logits))])
        ctx.save_for_backward(logits, targets, totals)
        return totals - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """g (softmax - one-hot), subtracted before it is rounded: a sure prediction leaves a small difference."""
        logits, targets, totals = ctx.saved_tensors
        targets, totals, g = targets.unsqueeze(-1), totals.unsqueeze(-1), g.unsqueeze(-1)  # (S, 1) each
        gradient = torch.empty_like(logits)
        size = _rows(logits)
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            difference = torch.exp(_wide(logits[rows]) - totals[rows])
            difference.scatter_add_(-1, targets[rows], difference.new_full(targets[rows].shape, -1.0))
            gradient[rows] = difference.mul_(g[rows])
        return gradient, None


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK // logits.shape[-1])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
