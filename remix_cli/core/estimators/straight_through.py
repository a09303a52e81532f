"""Straight-through (Bengio et al. 2013), BIASED: forward z, backward as if it were its probability."""

from remix_cli.core import routing
from remix_cli.core.estimators.base import Estimate, Estimator, Numbers
from remix_cli.core.estimators.rollouts import Rollouts, masked_selection_gradients


class StraightThrough(Estimator):
    """1/M sum_m sum_d h_md . grad pi_d, with h = dL/dz: the mean over the passes that have gradients."""

    def estimate(self, r: Rollouts, numbers: Numbers) -> Estimate:
        h = masked_selection_gradients(r)
        pi = routing.inclusion_probabilities(r.logits[: len(h)], r.chosen.shape[-1])
        return Estimate((h * pi).sum() / len(h), r.losses.new_zeros(()), r.losses.new_zeros(0))
