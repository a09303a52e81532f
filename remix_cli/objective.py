"""ReMix's objective: from token losses and selections to a scalar whose gradient trains the router.

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
(`straight_through`, Bengio et al. 2013) is the linear term alone: 1/M sum_m sum_d h_md . grad pi_d, h = dL/dz.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from remix_cli.adapter import routing

Name = Literal["paper", "rtg", "control_variate", "straight_through"]


@dataclass(frozen=True)
class Estimator:
    """One way to estimate the router's gradient; `linear` ones read h, the loss's gradient by selection."""

    name: Name
    unbiased: bool
    min_selections: int
    linear: bool
    summary: str
    samples_beside_top: bool = True  # False: with a pass under the top k it needs no sample


ESTIMATORS: dict[str, Estimator] = {
    e.name: e
    for e in (
        Estimator("paper", True, 2, False, "batch loss as reward, ordered log-probability, as published"),
        Estimator("rtg", True, 2, False, "per-position reward-to-go, set log-probability"),
        Estimator("control_variate", True, 2, True, "rtg with a linear control variate from the LoRA gradient"),
        Estimator(
            "straight_through", False, 1, True, "BIASED: first-order gradient through inclusion probabilities", False
        ),
    )
}


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


def credit(estimator: str, losses: Tensor, local: Tensor) -> Tensor:
    """The loss each decision answers for, (M, L, B, T), or (M, 1, 1, 1) for `paper`."""
    if estimator == "paper":
        return losses.sum((1, 2))[:, None, None, None]
    return torch.where(local[:, None, None], losses[:, None], reward_to_go(losses)[:, None])


def score(estimator: str, logits: Tensor, chosen: Tensor) -> Tensor:
    """Log-probability of each selection, (...): ordered for `paper` and for k beyond the subset recursion."""
    if estimator == "paper" or chosen.shape[-1] > routing.MAX_SET_SIZE:
        return routing.ordered_log_prob(logits, chosen)
    return routing.set_log_prob(logits, chosen)


def router_surrogate(estimator: str, rollouts: Rollouts, beta: float | Tensor = 0.0) -> tuple[Tensor, "Diagnostics"]:
    """A scalar whose gradient with respect to the routers is the estimate, and what is worth logging.

    `beta` is the control variate's coefficient; it must not come from these rollouts. Raises ValueError
    for M < 2 without a top-k pass, straight-through excepted.
    """
    r = rollouts
    if estimator == "straight_through":
        return _straight_through(r), Diagnostics(r.losses.new_zeros(()), None)
    top = credit(estimator, r.top.losses[None], r.local)[0] if r.top else None
    gained = advantages(credit(estimator, r.losses, r.local), top)  # (M, L, B, T)
    m = gained.shape[0]
    share = torch.full((m, 1, 1, 1), 1 / m, dtype=r.losses.dtype, device=r.losses.device)
    linear = torch.zeros((), dtype=r.losses.dtype, device=r.losses.device)
    fit = None
    if estimator == "control_variate":
        predicted, linear, share = _control_variate(r, beta)
        fit = torch.stack([(gained * predicted * r.mask).sum(), (predicted**2 * r.mask).sum()])
        gained = gained - beta * predicted
    log_prob = score(estimator, r.logits, r.chosen)
    surrogate = (share * gained.detach() * log_prob * r.mask).sum() + linear
    variance = gained.detach().var() if gained.numel() > 1 else gained.new_zeros(())
    return surrogate, Diagnostics(variance, fit)


def _straight_through(r: Rollouts) -> Tensor:
    """Forward z, backward as if it were pi(logits): the mean over the passes that have gradients of h . pi."""
    h = _selection_gradients(r)
    pi = routing.inclusion_probabilities(r.logits[: len(h)], r.chosen.shape[-1])
    return (h * pi).sum() / len(h)


def _selection_gradients(r: Rollouts) -> Tensor:
    if r.selection_gradients is None:
        raise ValueError("this estimator needs the selections' gradients")
    return r.selection_gradients * r.mask[..., None]


@dataclass
class Diagnostics:
    """For the log: variance of the advantages, and (sum res * C, sum C^2), the next coefficient's regression."""

    advantage_variance: Tensor
    fit: Tensor | None


def _control_variate(r: Rollouts, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centred prediction C - C^LOO (M, L, B, T), the term that restores its mean, and each sample's share.

    hbar_m is the mean of h = dL/dz over the OTHER samples; a sample's own h would bias the estimate. With
    the gradient of sample 0 alone, the others use it and sample 0 enters without a control variate. That of a top-k
    pass serves every sample.
    """
    if r.top:
        return _control_variate_from_top(r, r.top, beta)
    m, n = r.chosen.shape[0], r.logits.shape[-1]
    z = routing.selection_mask(r.chosen, n)
    pi = routing.inclusion_probabilities(r.logits, r.chosen.shape[-1])  # with graph
    h = _selection_gradients(r)
    share = torch.full((m, 1, 1, 1), 1 / m, dtype=r.losses.dtype, device=r.losses.device)
    if h.shape[0] == m:
        hbar = (h.sum(0) - h) / (m - 1)
    else:
        hbar = h.expand(m, *h.shape[1:]).clone()
        hbar[0] = 0
        first = (1 - beta) / m
        share[0], share[1:] = first, (1 - first) / (m - 1)
    surprise = z.to(hbar.dtype) - pi.detach()  # (M, L, B, T, n), mean zero given what came before
    effect = torch.einsum("mlbtn,plbtn->mplbt", hbar, surprise)  # what hbar_m says sample p gained or lost
    predicted = _predicted_returns(effect, r.local)  # (M, M, L, B, T)
    mine = predicted.diagonal(dim1=0, dim2=1).movedim(-1, 0)  # (M, L, B, T)
    others = (predicted.sum(1) - mine) / (m - 1)
    linear = beta * (share[..., None] * hbar * pi).sum()
    return mine - others, linear, share


def _control_variate_from_top(r: Rollouts, top: TopPass, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with h of the top-k pass, which no sample's selection enters, for all samples and their baseline."""
    m, n, k = r.chosen.shape[0], r.logits.shape[-1], r.chosen.shape[-1]
    h = _selection_gradients(r)[0]  # (L, B, T, n)
    pi = routing.inclusion_probabilities(r.logits, k)  # with graph
    sampled = routing.selection_mask(r.chosen, n).to(h.dtype) - pi.detach()
    of_top = routing.selection_mask(top.chosen, n).to(h.dtype) - routing.inclusion_probabilities(top.logits, k)
    predicted = _predicted_returns((h * sampled).sum(-1), r.local)  # (M, L, B, T)
    constant = _predicted_returns((h * of_top).sum(-1), r.local)  # (L, B, T)
    linear = beta * (h * pi).sum() / m
    share = torch.full((m, 1, 1, 1), 1 / m, dtype=r.losses.dtype, device=r.losses.device)
    return advantages(predicted, constant), linear, share


def _predicted_returns(effect: Tensor, local: Tensor) -> Tensor:
    """From what each router's choice is said to change, (..., L, B, T), to what is said of each decision's return:
    all routers at its position, and at later ones unless it is local."""
    own_position = effect.sum(-3, keepdim=True)  # (..., 1, B, T)
    return torch.where(local[:, None, None], own_position, reward_to_go(own_position))


@dataclass
class Coefficient:
    """The control variate's coefficient: a running least-squares fit on EARLIER steps, decay 0.95 a step."""

    products: float = 0.0
    squares: float = 0.0
    decay: float = 0.95

    @property
    def beta(self) -> float:
        """0 before the first step, then sum(res * C) / sum(C^2), kept within [0, 1]."""
        return min(max(self.products / self.squares, 0.0), 1.0) if self.squares > 0 else 0.0

    def update(self, fit: Tensor) -> None:
        products, squares = fit.tolist()
        self.products = self.decay * self.products + products
        self.squares = self.decay * self.squares + squares
