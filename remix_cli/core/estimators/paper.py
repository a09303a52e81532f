"""As published (arXiv 2603.10160, eq. for G_P): the batch's loss as the reward of every decision, ordered draws."""

from remix_cli.core import routing
from remix_cli.core.estimators.base import Estimate, Estimator, Numbers, equal_shares, score_surrogate, variance_of
from remix_cli.core.estimators.rollouts import Rollouts, advantages


class Paper(Estimator):
    def estimate(self, r: Rollouts, numbers: Numbers) -> Estimate:
        of_batch = r.losses.sum((1, 2))[:, None, None, None]  # (M, 1, 1, 1)
        top = None if r.top is None else r.top.losses.sum()[None, None, None]
        gained = advantages(of_batch, top)
        log_prob = routing.ordered_log_prob(r.logits, r.chosen)
        surrogate = score_surrogate(equal_shares(r), gained, log_prob, r.mask)
        return Estimate(surrogate, variance_of(gained), r.losses.new_zeros(0))
