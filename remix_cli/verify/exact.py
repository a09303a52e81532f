"""Exact bias: the mean of an estimator over ALL pairs of joint selections against the gradient of the expected loss.

The tiny decoder has two layers with attention, a prompt position, a target position and padding; float64. Pairs
(M = 2) are fed to the very function that training differentiates, vectorised.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from remix_cli.adapter import routing
from remix_cli.objective import ESTIMATORS
from remix_cli.verify.testbed import Rollout, Testbed, stack

TOLERANCE = 1e-10
CHUNK = 16384  # pairs differentiated at once


@dataclass(frozen=True)
class Bias:
    """`relative`: |mean estimate - gradient| / |gradient|, over `pairs` pairs of joint selections."""

    arm: str
    estimator: str
    claims_unbiased: bool
    relative: float
    pairs: int

    @property
    def holds(self) -> bool:
        return not self.claims_unbiased or self.relative <= TOLERANCE


class Enumeration:
    """Every joint selection of a tiny testbed, with its probability and what its pass left behind.

    `ordered` enumerates draws with their order, for `paper`; then one layer is routed, since orders multiply.
    """

    def __init__(self, k: int, ordered: bool, n: int = 4):
        self.bed = Testbed(
            n=n, k=k, hidden=8, lengths=[3], strength=0.5, dtype=torch.float64, routed="0" if ordered else r"\d"
        )
        # Positions 0 and 1 can reach a target, 2 is the last token, the rest padding. Masking position 2 too
        # leaves the gradient as it is (its decisions reach no loss) and the enumeration small.
        batch = self.bed.batch
        self.bed.batch = replace(batch, input_ids=batch.input_ids[:, :4], mask=batch.mask[:, :4])
        self.bed.batch.mask[0, 2] = False
        choices = itertools.permutations(range(n), k) if ordered else itertools.combinations(range(n), k)
        decisions = len(self.bed.routers) * 2
        self.trajectories = list(itertools.product(list(choices), repeat=decisions))
        self.all: Rollout = stack([self.bed.rollout(self._prescribe(t)) for t in self.trajectories])
        score = routing.ordered_log_prob if ordered else routing.set_log_prob
        logits = self.all.logits.clone().requires_grad_()
        log_q = (score(logits, self.all.chosen) * self.bed.batch.mask).sum((1, 2, 3))
        self.probability = log_q.detach().exp()
        expected_loss = (log_q.exp() * self.all.losses.sum((1, 2))).sum()
        (slopes,) = torch.autograd.grad(expected_loss, logits)
        self.truth = self._to_parameters(slopes)

    def _prescribe(self, trajectory: tuple[tuple[int, ...], ...]) -> Tensor:
        """Noise under which the routers choose exactly this trajectory, in this order."""
        config, (b, t) = self.bed.adapter.config, self.bed.batch.input_ids.shape
        noise = torch.zeros(len(self.bed.routers), b, t, config.pool_size, dtype=torch.float64)
        for index, chosen in enumerate(trajectory):
            layer, position = divmod(index, 2)
            for rank, item in enumerate(chosen):
                noise[layer, 0, position, item] = 1e6 * (len(chosen) - rank)
        return noise

    def _to_parameters(self, slopes: Tensor) -> Tensor:
        """Gradients at the logits of all trajectories, (J, L, B, T, n), to the routers' parameters, flat."""
        return torch.einsum("jlbtn,jlbtd->lnd", slopes, self.all.directions).flatten()

    def mean_estimate(self, estimator: str, beta: float = 0.0, one_backward: bool = False) -> Tensor:
        """E over all J x J pairs of the estimator with M = 2, flat.

        Without `one_backward` the two samples play the same part, so each unordered pair is worked out once.
        """
        j = len(self.trajectories)
        pairs = torch.cartesian_prod(torch.arange(j), torch.arange(j))
        pairs = pairs if one_backward else pairs[pairs[:, 0] <= pairs[:, 1]]
        slopes = torch.zeros_like(self.all.logits)

        def pair(logits: Tensor, losses: Tensor, chosen: Tensor, h: Tensor) -> Tensor:
            return self.bed.surrogate(logits, Rollout(losses, logits, chosen, h, h), estimator, beta, one_backward)

        each = vmap(grad(pair))
        for index in pairs.split(CHUNK):  # (C, 2)
            r = self.all[index]
            weight = self.probability[index].prod(1)
            if not one_backward:
                weight = weight * (1.0 + (index[:, 0] != index[:, 1]))
            found = each(r.logits, r.losses, r.chosen, r.h) * weight.view(-1, 1, 1, 1, 1, 1)
            slopes.index_add_(0, index.flatten(), found.flatten(0, 1))
        return self._to_parameters(slopes)

    def mean_straight_through(self) -> Tensor:
        """E of the straight-through gradient, flat: the LoRA gradient's h through the inclusion probabilities."""
        logits = self.all.logits.clone().requires_grad_()
        pi = routing.inclusion_probabilities(logits, self.bed.adapter.config.active)
        weighted = self.probability.view(-1, 1, 1, 1, 1) * self.all.h * pi * self.bed.batch.mask[..., None]
        (slopes,) = torch.autograd.grad(weighted.sum(), logits)
        return self._to_parameters(slopes)

    def relative_bias(self, mean: Tensor) -> float:
        return float((mean - self.truth).norm() / self.truth.norm())


def exact_biases(k: int = 2) -> list[Bias]:
    """Every estimator of the recipe; seconds of work."""
    sets, orders = Enumeration(k, ordered=False), Enumeration(k, ordered=True)
    arms: list[tuple[str, Enumeration, str, dict[str, Any]]] = [
        ("paper", orders, "paper", {}),
        ("rtg", sets, "rtg", {}),
        ("control_variate, beta = 1", sets, "control_variate", {"beta": 1.0}),
        ("control_variate, one backward", orders, "control_variate", {"beta": 0.5, "one_backward": True}),
    ]
    found = []
    for arm, enumeration, name, options in arms:
        bias = enumeration.relative_bias(enumeration.mean_estimate(name, **options))
        pairs = len(enumeration.trajectories) ** 2
        found.append(Bias(arm, name, ESTIMATORS[name].unbiased, bias, pairs))
    bias = sets.relative_bias(sets.mean_straight_through())
    name = "straight_through"
    return [*found, Bias(name, name, ESTIMATORS[name].unbiased, bias, len(sets.trajectories))]
