"""Routing mathematics as pure functions on tensors.

Letters: n LoRAs in a pool, k active, B sequences, T positions; `...` is any leading shape, usually (B, T).
`logits` are the router's scores before the softmax, (..., n), float32 or wider; q = softmax(logits).
A selection is k of the n, drawn from q without replacement in order i_1 .. i_k (Plackett-Luce).
"""

import itertools
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from remix_cli.core.quadrature import inclusion_by_quadrature

MAX_SUBSETS = 512  # that exact inclusion probabilities sum over for each token
SUBSETS_AT_ONCE = 2**25  # over all tokens; what the recursions keep for their backward pass is a few times that

# Multipliers and shifts of the SplitMix64 output function (Steele, Lea, Flood 2014), as signed integers.
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors: every input bit changes half of the output bits."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier  # logical, not arithmetic, shift
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """A new key for each (key, value) pair, int64, broadcasting; the building block of counter-based draws."""
    if isinstance(value, Tensor):
        return _mix(key + (value + 1) * _GOLDEN)
    step = (value + 1) * _GOLDEN % (1 << 64)  # as the tensor would wrap around
    if step >= 1 << 63:
        step -= 1 << 64
    return _mix(key + step)


def gumbel_noise(key: Tensor, routers: int, pool_size: int) -> Tensor:
    """Standard Gumbel noise, (routers, ..., pool_size) float32, for int64 keys of shape (...).

    A pure function of the key: the same position draws the same noise on any device, rank, batch
    composition and padding, and a recomputed forward pass draws it again. 24 random bits per value.
    """
    router = torch.arange(routers, device=key.device).view(-1, *[1] * key.dim())
    keys = fold(fold(key, router).unsqueeze(-1), torch.arange(pool_size, device=key.device))
    uniform = (((keys >> 40) & 0xFFFFFF).double() + 0.5) / (1 << 24)
    return -torch.log(-torch.log(uniform)).float()


def top_k(scores: Tensor, k: int) -> Tensor:
    """The ids of the k largest scores, (..., k), largest first.

    On logits this is ReMix's choice at inference; on logits + Gumbel noise it is a draw from q without
    replacement, in order of drawing (the Gumbel-top-k trick, Kool et al. 2019).
    """
    return scores.topk(k, dim=-1).indices


def selection_mask(chosen: Tensor, pool_size: int) -> Tensor:
    """z, (..., n) bool: True where a LoRA is among the chosen ids (..., k)."""
    return (chosen.unsqueeze(-1) == torch.arange(pool_size, device=chosen.device)).any(-2)


def ordered_log_prob(logits: Tensor, order: Tensor) -> Tensor:
    """log Q of drawing `order` (..., k) in that order: sum_j log q_{i_j} - log(1 - sum_{j'<j} q_{i_j'}). (...)

    1 - sum q is summed over what is left instead (a log-sum-exp), so that it never cancels to 0.
    """
    picked = logits.gather(-1, order)  # (..., k)
    rest = logits.masked_fill(selection_mask(order, logits.shape[-1]), -math.inf).logsumexp(-1, keepdim=True)
    # What is left before draw j: everything unpicked and picks j .. k, a reversed cumulative log-sum-exp.
    tail = torch.cat([picked, rest], dim=-1).flip(-1).logcumsumexp(-1).flip(-1)[..., :-1]  # (..., k)
    return (picked - tail).sum(-1)


class _Level:
    """The subsets of {0 .. m-1} of one size j, as index tables.

    `outside` (C(m, j), m) is True where an item is not in the subset; for j >= 1, `items` and `parents`
    (C(m, j), j) name each member and the position, one level down, of the subset without that member.
    """

    def __init__(self, m: int, size: int, below: dict[tuple[int, ...], int]):
        self.subsets = list(itertools.combinations(range(m), size))
        outside, parents = [], []
        for subset in self.subsets:
            outside.append([i not in subset for i in range(m)])
            smaller = [subset[:at] + subset[at + 1 :] for at in range(size)]
            parents.append([below[parent] for parent in smaller])
        self.outside = torch.tensor(outside)
        self.items = torch.tensor(self.subsets)
        self.parents = torch.tensor(parents)


@cache
def _levels(m: int, sizes: int, device: torch.device) -> list[_Level]:
    """Tables for the subset recursions, sizes 0 .. `sizes`."""
    levels: list[_Level] = []
    below: dict[tuple[int, ...], int] = {}
    for size in range(sizes + 1):
        level = _Level(m, size, below)
        below = {subset: position for position, subset in enumerate(level.subsets)}
        for name in ("outside", "items", "parents"):
            setattr(level, name, getattr(level, name).to(device))
        levels.append(level)
    return levels


def _piecewise(work: Callable[..., Tensor], subsets: int, *tensors: Tensor) -> Tensor:
    """`work` on tensors (..., any), token by token, in pieces whose intermediate values fit in memory.

    With M = 8 selections the routers of a model decide millions of times a step, and a recursion over subsets keeps
    hundreds of values for each. Pieces keep none of them: the backward pass computes a piece again.
    """
    leading = tensors[0].shape[:-1]
    at_once = max(1, SUBSETS_AT_ONCE // subsets)  # tokens
    if math.prod(leading) <= at_once:
        return work(*tensors)
    split = [x.flatten(0, -2).split(at_once) for x in tensors]
    results = []
    for piece in zip(*split, strict=True):
        results.append(checkpoint(work, *piece, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(results).unflatten(0, leading)


MAX_SET_SIZE = 8  # 2^k subsets per position in set_log_prob


def set_log_prob(logits: Tensor, chosen: Tensor) -> Tensor:
    """log of the probability that the first k draws are the set `chosen` (..., k), in whatever order. (...)

    Exact: a recursion over the 2^k subsets S of the chosen, f(S) = sum_{i in S} f(S - i) q_i / (1 - q(S - i)),
    in logs. Scoring the set instead of the order is a Rao-Blackwell step: the same mean gradient and never
    more variance. Raises ValueError for k > MAX_SET_SIZE.
    """
    k = chosen.shape[-1]
    if k > MAX_SET_SIZE:
        raise ValueError(f"set_log_prob is for k <= {MAX_SET_SIZE}, got k = {k}; use ordered_log_prob")
    return _piecewise(_set_log_prob, 2**k, logits, chosen)


def _set_log_prob(logits: Tensor, chosen: Tensor) -> Tensor:
    k = chosen.shape[-1]
    picked = logits.gather(-1, chosen)  # (..., k)
    mask = selection_mask(chosen, logits.shape[-1])
    rest = logits.masked_fill(mask, -math.inf).logsumexp(-1, keepdim=True)  # (..., 1)
    log_f = torch.zeros_like(rest)  # f of the empty set
    gain = log_f
    for size, level in enumerate(_levels(k, k, logits.device)):
        if size:
            log_f = (gain[..., level.parents] + picked[..., level.items]).logsumexp(-1)  # (..., C(k, size))
        if size < k:
            left = picked.unsqueeze(-2).masked_fill(~level.outside, -math.inf)  # (..., C, k)
            gain = log_f - torch.cat([left, rest.unsqueeze(-2).expand(*left.shape[:-1], 1)], -1).logsumexp(-1)
    return log_f.squeeze(-1)


def inclusion_probabilities(logits: Tensor, k: int) -> Tensor:
    """pi, (..., n): the probability that each LoRA is among k draws without replacement; sums to k.

    Exact for up to MAX_SUBSETS sets S of fewer than k items, by the recursion of `set_log_prob` over them:
    pi_i = q_i * sum_{S without i} f(S) / (1 - q(S)). Computed in float64, where 1 - q(S) is a sum of what is
    left and so keeps its relative precision; logits more than 300 below the largest are raised to there
    (in float32 that bound would have to be 40, which a saturated router reaches). For larger pools by
    numerical integration, whose error quadrature.py states.
    """
    n = logits.shape[-1]
    if k == n:
        return torch.ones_like(logits)
    subsets = sum(math.comb(n, size) for size in range(k))
    if subsets > MAX_SUBSETS:
        return inclusion_by_quadrature(logits, k).to(logits.dtype)
    return _piecewise(lambda piece: _inclusion_by_subsets(piece, k), subsets, logits)


def _inclusion_by_subsets(logits: Tensor, k: int) -> Tensor:
    n = logits.shape[-1]
    wide = logits.double()
    q = (wide - wide.amax(-1, keepdim=True).detach()).clamp_min(-300).softmax(-1)
    f = gain = torch.ones_like(q[..., :1])
    reached = torch.zeros_like(q)
    for size, level in enumerate(_levels(n, k - 1, logits.device)):
        if size:
            f = (gain[..., level.parents] * q[..., level.items]).sum(-1)  # (..., C(n, size))
        outside = level.outside.to(q.dtype)
        gain = f / (q @ outside.T)
        reached = reached + gain @ outside
    return (q * reached).to(logits.dtype)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of q in nats, (...): between 0 and ln n."""
    log_q = logits.log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1)


def effective_support_size(weights: Tensor) -> Tensor:
    """ESS = (sum_i |w_i|)^2 / sum_i w_i^2, (...): 1 for a one-hot weight vector, n for a uniform one."""
    return weights.abs().sum(-1).square() / weights.square().sum(-1)
