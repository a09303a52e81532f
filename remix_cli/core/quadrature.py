"""Inclusion probabilities of k of n sampling for pools too large to sum over sets, by numerical integration.

Drawing without replacement from q is a race (Efraimidis and Spirakis 2006): LoRA i arrives at a time T_i that is
exponential with rate q_i, and the first k to arrive are the selection. So

    pi_i = integral over t of  q_i exp(-q_i t)  P(fewer than k of the others have arrived by t)

The probability is a Poisson-binomial one, found by a recursion over the pool of O(n k) positive terms. With
t = exp(x - exp(-x)) the integrand is analytic in x and vanishes doubly exponentially at both ends, where the
trapezoidal rule converges geometrically (Takahasi and Mori 1974).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NODES = 96
TAIL = 40.0  # exp(-40): probabilities below it are left out
BYTES = 1 << 26  # of one chunk's recursion


def inclusion_by_quadrature(logits: Tensor, k: int, nodes: int = NODES) -> Tensor:
    """pi, (..., n) float64, for logits (..., n) and k < n, differentiable once.

    Absolute error: at most 1e-12 while the k largest logits lie within 10 nats of each other, 1e-8 within 40
    (tests/core/test_routing.py); it grows with that distance, over which the nodes are spread. A gap of more than 40
    nats between neighbours decides the draw to within exp(-40) and is narrowed to 40.
    """
    n = logits.shape[-1]
    flat = logits.double().flatten(0, -2)
    size = max(1, BYTES // (8 * n * nodes * k))
    parts: list[Tensor] = [_Inclusion.apply(part, k, nodes) for part in flat.split(size)]
    return torch.cat(parts).view(logits.shape)


class _Inclusion(torch.autograd.Function):
    """d pi_i / d logit_j is symmetric, so the backward pass is a forward derivative and needs no stored graph.

    (For i != j it is minus the integral of q_i q_j t exp(-(q_i + q_j) t) P(exactly k - 1 of the rest), and rows
    sum to zero.)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int, nodes: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.sizes = k, nodes
        return _integrate(logits, k, nodes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        product = torch.func.jvp(lambda x: _integrate(x, *ctx.sizes), (logits,), (gradient,))[1]
        return product, None, None


def _integrate(logits: Tensor, k: int, nodes: int) -> Tensor:
    """(S, n) from (S, n)."""
    log_q = (logits + _narrowing(logits.detach())).log_softmax(-1)
    kth = log_q.detach().topk(k, dim=-1).values[:, -1:]  # once it is sure to have arrived, so are k
    first, last = -math.log(TAIL), math.log(TAIL) - kth
    step = (last - first) / nodes
    x = first + step * (torch.arange(nodes, device=logits.device) + 0.5)  # (S, nodes)
    log_t = x - (-x).exp()
    race = (log_q.unsqueeze(-1) + log_t.unsqueeze(1)).exp()  # (S, n, nodes), q_i t
    waiting, arrived = (-race).exp(), -torch.expm1(-race)  # LoRA i has not, has arrived by t
    weight = (step * (1 + (-x).exp())).unsqueeze(1)  # dx times d(log t)/dx
    return (race * waiting * _fewer_than_k_others(arrived, waiting, k) * weight).sum(-1)


def _narrowing(logits: Tensor) -> Tensor:
    """What to add to the logits so that no gap between neighbours in size exceeds TAIL."""
    ordered, index = logits.sort(-1)
    narrow = F.pad(ordered.diff(dim=-1).clamp_max(TAIL).cumsum(-1), (1, 0))
    return torch.zeros_like(logits).scatter(-1, index, narrow) - logits


def _fewer_than_k_others(arrived: Tensor, waiting: Tensor, k: int) -> Tensor:
    """P(fewer than k of the pool without i), (S, n, nodes), from each one's own probabilities of the same shape.

    Counts of those before i and of those after i are kept apart, so that nothing has to be divided out again.
    """
    n = arrived.shape[1]

    def counts(order: range) -> list[Tensor]:
        """P(count = 0 .. k - 1), (S, k, nodes), before each item of `order` is added."""
        none = torch.ones_like(arrived[:, :1])
        state = F.pad(none, (0, 0, 0, k - 1))
        found = []
        for i in order:
            found.append(state)
            moved = F.pad(state[:, :-1], (0, 0, 1, 0))
            state = state * waiting[:, i : i + 1] + moved * arrived[:, i : i + 1]
        return found

    before, after = counts(range(n)), counts(range(n - 1, -1, -1))[::-1]
    return torch.stack([(b * a.cumsum(1).flip(1)).sum(1) for b, a in zip(before, after, strict=True)], dim=1)
