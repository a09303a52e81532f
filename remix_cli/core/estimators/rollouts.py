"""What M passes leave behind, and what estimators have in common: returns, baselines, scores.

Pure functions on tensors. Letters: M selections sampled for one batch, L routers, B sequences, T positions,
n LoRAs in a pool, k active, N supervised tokens of the whole optimizer step (all micro-batches and ranks).
`losses` (M, B, T) are cross-entropies divided by N and indexed by the LOGIT's position: losses[..., t] is
about token t + 1 and can depend on decisions at positions <= t only. Positions without a target hold 0.

The estimate, for decision d with selection J_d and credited loss R_d (arXiv 2603.10160, eq. for G_P):

    G = 1/M sum_m sum_d (R_md - mean of R_m'd over m' != m) grad log Q(J_md)

which is 1/(M-1) sum_m (R_m - mean) grad log Q(J_m) when R is the same for all decisions. How ours departs:
1. credit: a decision answers only for the losses that it can reach (`reward_to_go`, `local`), not the batch;
2. score: the log-probability of the chosen set, not of the order it was drawn in;
3. optionally a linear control variate from the LoRA backward pass.
Each step keeps the expectation and lowers the variance. Proofs: docs/estimators.md. The biased alternative
(`straight_through`, Bengio et al. 2013) is the linear term alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from remix_cli.core import routing


@dataclass
class TopPass:
    """What a pass under the top k left behind, beside the samples and independent of them.

    Being a constant, given the routers, its loss may enter every sample's baseline and its gradient every sample's
    control variate without bias.
    """

    logits: Tensor  # (L, B, T, n)
    chosen: Tensor  # (L, B, T, k)
    losses: Tensor  # (B, T)


@dataclass
class Rollouts:
    """What M forward passes over one batch left behind, for all L routers.

    `logits` (M, L, B, T, n) carries the graph to the routers' parameters; everything else is data.
    `local` (L,) marks routers after the last attention. `mask` (B, T) is True where a real token stands.
    `selection_gradients` (M or 1, L, B, T, n) is h = dL_m/dz_m, for the control variate and straight-through; with
    `top` (1, L, B, T, n), that pass's.
    With routing by sequence T is 1 and `losses` are those of whole sequences.
    """

    logits: Tensor
    chosen: Tensor  # (M, L, B, T, k)
    losses: Tensor  # (M, B, T)
    local: Tensor
    mask: Tensor
    selection_gradients: Tensor | None = None
    top: TopPass | None = None


def reward_to_go(losses: Tensor) -> Tensor:
    """Sum of the losses from each position on, (..., T): what a decision at that position can still change.

    Valid for causal models only: losses before a decision's position do not depend on it.
    """
    return losses.flip(-1).cumsum(-1).flip(-1)


def leave_one_out(returns: Tensor) -> Tensor:
    """Advantages (M, ...): each sample's return minus the mean of the other M - 1. Raises ValueError for M < 2."""
    m = returns.shape[0]
    if m < 2:
        raise ValueError(f"the leave-one-out baseline needs at least 2 selections, got {m}")
    return (returns - returns.mean(0)) * (m / (m - 1))


def advantages(returns: Tensor, top: Tensor | None) -> Tensor:
    """(M, ...): each sample's return minus the mean of the other samples' and, if there is one, the top-k pass's.

    `returns` (M, ...), `top` (...). Without `top` this is `leave_one_out`.
    """
    if top is None:
        return leave_one_out(returns)
    m = returns.shape[0]
    others = returns.sum(0) - returns + top
    return returns - others / m


def reachable_returns(losses: Tensor, local: Tensor) -> Tensor:
    """The loss that each decision can still change, (..., L, B, T), from losses (..., B, T): that of its position for
    routers after the last attention, `local` (L,); from its position on for the others."""
    return torch.where(local[:, None, None], losses[..., None, :, :], reward_to_go(losses)[..., None, :, :])


def set_score(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log-probability of each selection as a set, (...); of the order it was drawn in for k beyond the recursion."""
    if chosen.shape[-1] > routing.MAX_SET_SIZE:
        return routing.ordered_log_prob(logits, chosen)
    return routing.set_log_prob(logits, chosen)


def masked_selection_gradients(r: Rollouts) -> Tensor:
    """h = dL/dz (M or 1, L, B, T, n), 0 at padding. Raises ValueError if the passes kept none."""
    if r.selection_gradients is None:
        raise ValueError("this estimator needs the selections' gradients")
    return r.selection_gradients * r.mask[..., None]


def predicted_returns(effect: Tensor, local: Tensor) -> Tensor:
    """From what each router's choice is said to change, (..., L, B, T), to what is said of each decision's return:
    all routers at its position, and at later ones unless it is local."""
    own_position = effect.sum(-3, keepdim=True)  # (..., 1, B, T)
    return torch.where(local[:, None, None], own_position, reward_to_go(own_position))
