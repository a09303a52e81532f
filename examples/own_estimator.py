"""An estimator of one's own: the batch's loss against a running mean of earlier steps' losses, as in plain REINFORCE.

Put the file into remix_cli/core/estimators and an entry into registry.py there:

    "moving_baseline": EstimatorFacts(
        "remix_cli.core.estimators.moving_baseline:MovingBaseline", "batch loss against its running mean", True, 1
    ),

Then `router.estimator: moving_baseline` trains with it, one selection being enough, and `remix verify-estimator`
enumerates every selection to see whether it is unbiased, as the entry claims.
"""

import torch

from remix_cli.core.estimators.base import Estimate, Estimator, equal_shares, score_surrogate, variance_of
from remix_cli.core.estimators.rollouts import set_score

DECAY = 0.9


class MovingBaseline(Estimator):
    sums = 2  # the losses of a step's batches, and how many they were

    def __init__(self):
        self.mean = 0.0

    def numbers(self):
        return {"mean": self.mean}

    def logged(self):
        return {"baseline": self.mean}

    def update(self, sums):
        loss, batches = sums
        self.mean = DECAY * self.mean + (1 - DECAY) * loss / batches

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state.get("mean", 0.0)

    def estimate(self, r, numbers):
        losses = r.losses.sum((1, 2))  # (M,), of the whole batch
        gained = (losses - numbers.get("mean", 0.0))[:, None, None, None]
        surrogate = score_surrogate(equal_shares(r), gained, set_score(r.logits, r.chosen), r.mask)
        return Estimate(surrogate, variance_of(gained), torch.stack([losses.mean(), torch.ones_like(losses[0])]))
