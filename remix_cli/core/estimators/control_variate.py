"""rtg with a linear control variate: what the LoRAs' backward pass says that a choice gained or lost, taken away.

Its mean is restored in closed form through the inclusion probabilities, so the estimate stays unbiased.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from remix_cli.core import routing
from remix_cli.core.estimators.base import Estimate, Estimator, Numbers, score_surrogate, variance_of
from remix_cli.core.estimators.rollouts import (
    Rollouts,
    TopPass,
    advantages,
    masked_selection_gradients,
    predicted_returns,
    reachable_returns,
    set_score,
)

DECAY = 0.95  # a step, of what the coefficient was fitted on


class ControlVariate(Estimator):
    """The coefficient `beta` is a running least-squares fit on EARLIER steps."""

    sums = 2  # of residual times prediction, and of the prediction's square

    def __init__(self) -> None:
        self.products = 0.0
        self.squares = 0.0

    @property
    def beta(self) -> float:
        """0 before the first step, then sum(residual * C) / sum(C^2), kept within [0, 1]."""
        return min(max(self.products / self.squares, 0.0), 1.0) if self.squares > 0 else 0.0

    def numbers(self) -> dict[str, float]:
        return {"beta": self.beta}

    def logged(self) -> dict[str, float]:
        return {"control_variate_beta": self.beta}

    def update(self, sums: list[float]) -> None:
        products, squares = sums
        self.products = DECAY * self.products + products
        self.squares = DECAY * self.squares + squares

    def state_dict(self) -> dict[str, float]:
        return {"products": self.products, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.products, self.squares = state.get("products", 0.0), state.get("squares", 0.0)

    def estimate(self, r: Rollouts, numbers: Numbers) -> Estimate:
        beta = numbers["beta"]
        top = None if r.top is None else reachable_returns(r.top.losses, r.local)
        gained = advantages(reachable_returns(r.losses, r.local), top)  # (M, L, B, T)
        predicted, linear, share = prediction(r, beta)
        sums = torch.stack([(gained * predicted * r.mask).sum(), (predicted**2 * r.mask).sum()])
        gained = gained - beta * predicted
        surrogate = score_surrogate(share, gained, set_score(r.logits, r.chosen), r.mask) + linear
        return Estimate(surrogate, variance_of(gained), sums)


def prediction(r: Rollouts, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centred prediction C - C^LOO (M, L, B, T), the term that restores its mean, and each sample's share.

    hbar_m is the mean of h = dL/dz over the OTHER samples; a sample's own h would bias the estimate. With
    the gradient of sample 0 alone, the others use it and sample 0 enters without a control variate. That of a top-k
    pass serves every sample.
    """
    if r.top:
        return _prediction_from_top(r, r.top, beta)
    m, n = r.chosen.shape[0], r.logits.shape[-1]
    z = routing.selection_mask(r.chosen, n)
    pi = routing.inclusion_probabilities(r.logits, r.chosen.shape[-1])  # with graph
    h = masked_selection_gradients(r)
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
    predicted = predicted_returns(effect, r.local)  # (M, M, L, B, T)
    mine = predicted.diagonal(dim1=0, dim2=1).movedim(-1, 0)  # (M, L, B, T)
    others = (predicted.sum(1) - mine) / (m - 1)
    linear = beta * (share[..., None] * hbar * pi).sum()
    return mine - others, linear, share


def _prediction_from_top(r: Rollouts, top: TopPass, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with h of the top-k pass, which no sample's selection enters, for all samples and their baseline."""
    m, n, k = r.chosen.shape[0], r.logits.shape[-1], r.chosen.shape[-1]
    h = masked_selection_gradients(r)[0]  # (L, B, T, n)
    pi = routing.inclusion_probabilities(r.logits, k)  # with graph
    sampled = routing.selection_mask(r.chosen, n).to(h.dtype) - pi.detach()
    of_top = routing.selection_mask(top.chosen, n).to(h.dtype) - routing.inclusion_probabilities(top.logits, k)
    predicted = predicted_returns((h * sampled).sum(-1), r.local)  # (M, L, B, T)
    constant = predicted_returns((h * of_top).sum(-1), r.local)  # (L, B, T)
    linear = beta * (h * pi).sum() / m
    share = torch.full((m, 1, 1, 1), 1 / m, dtype=r.losses.dtype, device=r.losses.device)
    return advantages(predicted, constant), linear, share
