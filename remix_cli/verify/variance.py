"""Variance of each estimator relative to `paper`'s at the same M, by sampling on a tiny decoder with attention.

tr Cov of the routers' gradient over independent groups of M passes, on one fixed batch. All estimators are worked
out from the same passes; intervals are bootstrapped over groups.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.estimators.rollouts import Rollouts, TopPass
from remix_cli.verify.testbed import Rollout, Testbed, stack

ARMS = {  # arm -> (estimator, where h comes from: every sample, the first, or a pass under the top k)
    "paper": ("paper", "all"),
    "rtg": ("rtg", "all"),
    "control_variate": ("control_variate", "all"),
    "control_variate, one backward": ("control_variate", "first"),
    "rtg, top k beside": ("rtg", "top"),
    "control_variate, top k beside": ("control_variate", "top"),
}
WARM_UP = 8  # groups that only fit the control variate's coefficient


@dataclass(frozen=True)
class VarianceRatio:
    """tr Cov(arm) / tr Cov(paper) at the same M, with a 95 % bootstrap interval."""

    arm: str
    selections: int
    ratio: float
    low: float
    high: float


def sample_rollouts(bed: Testbed, count: int, seed: int) -> Rollout:
    """`count` independent passes under drawn selections."""
    b, t = bed.batch.input_ids.shape
    noise = (bed.adapter.noise((seed, i), torch.arange(b), t) for i in range(count))
    return stack([bed.rollout(x) for x in noise])


def estimates(bed: Testbed, drawn: Rollout, m: int, arm: str) -> Tensor:
    """One gradient estimate for each disjoint group of m rollouts, (groups, parameters)."""
    name, source = ARMS[arm]
    estimator = make_estimator(name)
    top = None
    beside = None
    if source == "top":
        top = bed.top_rollout()
        beside = TopPass(top.logits, top.chosen, top.losses)
    found = []
    for index in torch.arange(len(drawn.losses)).split(m):
        if len(index) < m:
            break
        r = drawn[index]
        logits = r.logits.clone().requires_grad_()
        h = r.h
        if source == "first":
            h = r.h[:1]
        if top is not None:
            h = top.h[None]
        rollouts = Rollouts(logits, r.chosen, r.losses, bed.local, bed.mask, h, beside)
        estimate = estimator.estimate(rollouts, estimator.numbers())
        estimator.update(estimate.sums.tolist())
        (slopes,) = torch.autograd.grad(estimate.surrogate, logits)
        found.append(torch.einsum("mlbtn,mlbtd->lnd", slopes, r.directions).flatten())
    return torch.stack(found[WARM_UP:])


def variance_ratios(
    *, sequences: int = 4, length: int = 24, strength: float = 0.3, passes: int = 512, seed: int = 0
) -> list[VarianceRatio]:
    """Ratios for M = 2, 4, 8 from `passes` passes in all."""
    bed = Testbed(
        n=6, k=2, hidden=32, rank=4, lengths=[length] * sequences, strength=strength, dtype=torch.float32, seed=seed
    )
    rollouts = sample_rollouts(bed, passes, seed)
    random = np.random.default_rng(seed)
    ratios = []
    for m in (2, 4, 8):
        spread = {arm: _squared_deviations(estimates(bed, rollouts, m, arm)) for arm in ARMS}
        groups = len(spread["paper"])
        picks = random.integers(0, groups, (1000, groups))
        for arm, values in spread.items():
            resampled = values[picks].mean(1) / spread["paper"][picks].mean(1)
            low, high = np.quantile(resampled, [0.025, 0.975])
            ratio = float(values.mean() / spread["paper"].mean())
            ratios.append(VarianceRatio(arm, m, ratio, float(low), float(high)))
    return ratios


def _squared_deviations(estimates: Tensor) -> np.ndarray:
    """|estimate - mean|^2 of each group, scaled so that their mean is tr Cov."""
    centred = estimates.double() - estimates.double().mean(0)
    return (centred.square().sum(1) * (len(estimates) / (len(estimates) - 1))).numpy()
