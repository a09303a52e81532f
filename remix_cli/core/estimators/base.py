"""What an estimator gives, and what it may keep."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from remix_cli.core.estimators.rollouts import Rollouts

Numbers = Mapping[str, float | Tensor]


@dataclass
class Estimate:
    surrogate: Tensor  # a scalar whose gradient with respect to the routers is the estimate
    advantage_variance: Tensor  # for the log
    sums: Tensor  # (Estimator.sums,), of this batch; to be added up over a step


class Estimator(ABC):
    """One way to estimate the router's gradient; its claims are in the registry.

    An estimator may learn numbers from the steps, a coefficient for example. A step reads them as `numbers()`, which
    may come back as tensors, so that a recorded step can be given others; it learns from the step's `sums`, which must
    not come from the rollouts that the numbers are used on.
    """

    sums = 0  # how many numbers of a step it learns from

    @abstractmethod
    def estimate(self, r: Rollouts, numbers: Numbers) -> Estimate:
        """Raises ValueError for fewer selections than it needs."""

    def numbers(self) -> dict[str, float]:
        return {}

    def update(self, sums: list[float]) -> None:  # noqa: B027  most learn nothing
        """Learn from a step's sums over all micro-batches and processes."""

    def logged(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {}

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:  # noqa: B027
        """Inverse of `state_dict`; an empty state is that of a new estimator."""


def variance_of(advantages: Tensor) -> Tensor:
    values = advantages.detach()
    return values.var() if values.numel() > 1 else values.new_zeros(())


def equal_shares(r: Rollouts) -> Tensor:
    """Each sample's share in the estimate, (M, 1, 1, 1): 1/M."""
    m = len(r.losses)
    return torch.full((m, 1, 1, 1), 1 / m, dtype=r.losses.dtype, device=r.losses.device)


def score_surrogate(share: Tensor, advantages: Tensor, log_prob: Tensor, mask: Tensor) -> Tensor:
    """The scalar whose gradient is the sum of share * advantage * grad log Q over all decisions of real tokens."""
    return (share * advantages.detach() * log_prob * mask).sum()
