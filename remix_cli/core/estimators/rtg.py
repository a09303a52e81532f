"""Reward-to-go: a decision answers for the losses that it can reach, and the set's log-probability is its score."""

from remix_cli.core.estimators.base import Estimate, Estimator, Numbers, equal_shares, score_surrogate, variance_of
from remix_cli.core.estimators.rollouts import Rollouts, advantages, reachable_returns, set_score


class RewardToGo(Estimator):
    def estimate(self, r: Rollouts, numbers: Numbers) -> Estimate:
        top = None if r.top is None else reachable_returns(r.top.losses, r.local)
        gained = advantages(reachable_returns(r.losses, r.local), top)  # (M, L, B, T)
        surrogate = score_surrogate(equal_shares(r), gained, set_score(r.logits, r.chosen), r.mask)
        return Estimate(surrogate, variance_of(gained), r.losses.new_zeros(0))
