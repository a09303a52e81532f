"""Exact bias: the mean of an estimator over ALL pairs of joint selections against the gradient of the expected loss.

The tiny decoder has two layers with attention, a prompt position, a target position and padding; float64. Pairs
(M = 2) are fed to the very function that training differentiates, vectorised.
"""

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad, vmap

from remix_cli.core import routing
from remix_cli.core.config import Level
from remix_cli.core.estimators.registry import ESTIMATORS
from remix_cli.errors import RecipeError
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
    Routing by token has one sequence of two decisions a layer, by sequence two sequences of one.
    """

    def __init__(self, k: int, ordered: bool, n: int = 4, level: Level = "token"):
        self.bed = Testbed(
            n=n,
            k=k,
            hidden=8,
            lengths=[3] if level == "token" else [3, 4],
            strength=0.5,
            dtype=torch.float64,
            routed="0" if ordered else r"\d",
            level=level,
        )
        if level == "token":
            self._shorten()
        self.slots = self.bed.mask.nonzero().tolist()  # (sequence, position) of each router's decisions
        choices = list(itertools.combinations(range(n), k))
        if ordered:
            choices = list(itertools.permutations(range(n), k))
        decisions = len(self.bed.routers) * len(self.slots)
        self.trajectories = list(itertools.product(choices, repeat=decisions))
        self.top = self.bed.top_rollout()
        self.all: Rollout = stack([self.bed.rollout(self._prescribe(t)) for t in self.trajectories])
        score = routing.ordered_log_prob if ordered else routing.set_log_prob
        logits = self.all.logits.clone().requires_grad_()
        log_q = (score(logits, self.all.chosen) * self.bed.mask).sum((1, 2, 3))
        self.probability = log_q.detach().exp()
        expected_loss = (log_q.exp() * self.all.losses.sum((1, 2))).sum()
        (slopes,) = torch.autograd.grad(expected_loss, logits)
        self.truth = self._to_parameters(slopes)

    def _shorten(self) -> None:
        """Positions 0 and 1 can reach a target, 2 is the last token, the rest padding. Masking position 2 too
        leaves the gradient as it is (its decisions reach no loss) and the enumeration small."""
        batch = self.bed.batch
        changes = {name: getattr(batch, name)[:, :4] for name in ("input_ids", "mask", "prompt")}
        self.bed.batch = replace(batch, **changes)
        self.bed.batch.mask[0, 2] = False

    def _prescribe(self, trajectory: tuple[tuple[int, ...], ...]) -> Tensor:
        """Noise under which the routers choose exactly this trajectory, in this order."""
        config = self.bed.adapter.config
        noise = torch.zeros(len(self.bed.routers), *self.bed.mask.shape, config.pool_size, dtype=torch.float64)
        for index, chosen in enumerate(trajectory):
            layer, slot = divmod(index, len(self.slots))
            sequence, position = self.slots[slot]
            for rank, item in enumerate(chosen):
                noise[layer, sequence, position, item] = 1e6 * (len(chosen) - rank)
        return noise

    def _to_parameters(self, slopes: Tensor) -> Tensor:
        """Gradients at the logits of all trajectories, (J, L, B, T, n), to the routers' parameters, flat."""
        return torch.einsum("jlbtn,jlbtd->lnd", slopes, self.all.directions).flatten()

    def mean_estimate(self, estimator: str, beta: float = 0.0, one_backward: bool = False, top: bool = False) -> Tensor:
        """E over all J x J pairs of the estimator with M = 2, flat; `top`: with a pass under the top k beside them.

        Without `one_backward` the two samples play the same part, so each unordered pair is worked out once.
        """
        beside = self.top if top else None
        j = len(self.trajectories)
        pairs = torch.cartesian_prod(torch.arange(j), torch.arange(j))
        if not one_backward:
            pairs = pairs[pairs[:, 0] <= pairs[:, 1]]
        slopes = torch.zeros_like(self.all.logits)

        def pair(logits: Tensor, losses: Tensor, chosen: Tensor, h: Tensor) -> Tensor:
            return self.bed.surrogate(
                logits, Rollout(losses, logits, chosen, h, h), estimator, beta, one_backward, beside
            )

        each = vmap(grad(pair))
        for index in pairs.split(CHUNK):  # (C, 2)
            r = self.all[index]
            weight = self.probability[index].prod(1)
            if not one_backward:
                weight = weight * (1.0 + (index[:, 0] != index[:, 1]))
            found = each(r.logits, r.losses, r.chosen, r.h) * weight.view(-1, 1, 1, 1, 1, 1)
            slopes.index_add_(0, index.flatten(), found.flatten(0, 1))
        return self._to_parameters(slopes)

    def mean_of_one(self, estimator: str, beta: float = 0.0) -> Tensor:
        """E over all J of the estimator with M = 1 and a pass under the top k, flat."""

        def single(logits: Tensor, losses: Tensor, chosen: Tensor) -> Tensor:
            one = Rollout(losses[None], logits[None], chosen[None], logits[None], logits[None])
            return self.bed.surrogate(logits[None], one, estimator, beta, False, self.top)

        slopes = vmap(grad(single))(self.all.logits, self.all.losses, self.all.chosen)
        return self._to_parameters(slopes * self.probability.view(-1, 1, 1, 1, 1))

    def mean_straight_through(self) -> Tensor:
        """E over all J of the straight-through estimator with M = 1, flat."""
        logits = self.all.logits.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(self.bed.surrogate(logits, self.all, "straight_through", 0.0, False), logits)
        weight = self.probability * len(self.trajectories)  # the surrogate is a plain mean
        return self._to_parameters(slopes * weight.view(-1, 1, 1, 1, 1))

    def relative_bias(self, mean: Tensor) -> float:
        return float((mean - self.truth).norm() / self.truth.norm())


class Enumerations:
    """Those that the arms need, each made when the first arm asks for it: they take seconds."""

    def __init__(self, k: int):
        self.k = k

    @cached_property
    def sets(self) -> Enumeration:
        return Enumeration(self.k, ordered=False)

    @cached_property
    def orders(self) -> Enumeration:
        return Enumeration(self.k, ordered=True)

    @cached_property
    def by_sequence(self) -> Enumeration:
        return Enumeration(2, ordered=False, n=3, level="sequence")

    @cached_property
    def two_rows(self) -> Enumeration:
        """Of draws with their order: for estimators that may score it, and compare the rows of a batch."""
        return Enumeration(2, ordered=True, n=3, level="sequence")


@dataclass(frozen=True)
class _Arm:
    """An estimator on pairs of an enumeration, with the options of `mean_estimate`; or with M = 1."""

    name: str
    on: str  # an attribute of Enumerations
    estimator: str
    beta: float = 0.0
    one_backward: bool = False
    top: bool = False
    alone: bool = False  # M = 1

    def bias(self, enumerations: Enumerations) -> Bias:
        enumeration: Enumeration = getattr(enumerations, self.on)
        count = len(enumeration.trajectories)
        if not self.alone:
            mean = enumeration.mean_estimate(self.estimator, self.beta, self.one_backward, self.top)
            count = count**2
        elif self.top:
            mean = enumeration.mean_of_one(self.estimator, beta=self.beta)
        else:
            mean = enumeration.mean_straight_through()
        claims = ESTIMATORS[self.estimator].unbiased
        return Bias(self.name, self.estimator, claims, enumeration.relative_bias(mean), count)


ARMS = [
    _Arm("paper", "orders", "paper"),
    _Arm("rtg", "sets", "rtg"),
    _Arm("control_variate, beta = 1", "sets", "control_variate", beta=1.0),
    _Arm("control_variate, one backward", "orders", "control_variate", beta=0.5, one_backward=True),
    _Arm("rtg, by sequence", "by_sequence", "rtg"),
    _Arm("rtg, top k beside", "sets", "rtg", top=True),
    _Arm("control_variate, top k beside", "sets", "control_variate", beta=0.7, top=True),
    _Arm("rtg, M = 1, top k beside", "sets", "rtg", beta=0.7, top=True, alone=True),
    _Arm("control_variate, M = 1, top k beside", "sets", "control_variate", beta=0.7, top=True, alone=True),
    _Arm("straight_through", "sets", "straight_through", alone=True),
]


def exact_biases(k: int = 2, estimator: str | None = None) -> list[Bias]:
    """Of every estimator of the registry, or of one; a minute for all. Raises RecipeError for a name that is none."""
    if estimator is not None and estimator not in ESTIMATORS:
        raise RecipeError(f"{estimator}: no such estimator; use {', '.join(ESTIMATORS)}")
    arms = list(ARMS)
    named = {arm.estimator for arm in arms}
    for name in ESTIMATORS:
        if name not in named:  # one of a user's own
            arms += [_Arm(name, "orders", name), _Arm(f"{name}, two rows by sequence", "two_rows", name)]
    enumerations = Enumerations(k)
    return [arm.bias(enumerations) for arm in arms if estimator in (None, arm.estimator)]
