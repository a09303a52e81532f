"""How sure a score is: intervals for one model, paired differences between two on the same items."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
_NORMAL = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Score:
    """A value over `count` items with its 95 % interval. `share`: a proportion; otherwise nats or perplexity."""

    value: float
    low: float
    high: float
    count: int
    share: bool = True


def wilson(hits: int, count: int) -> Score:
    """A proportion with Wilson's (1927) score interval, which stays within [0, 1] and does not collapse at 0 or 1."""
    p, z2 = hits / count, _NORMAL**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Score(p, max(0.0, centre - half), min(1.0, centre + half), count)


def ratio(numerators: np.ndarray, denominators: np.ndarray, *, share: bool) -> Score:
    """sum of numerators / sum of denominators over items (S,), with a percentile bootstrap over the items."""
    found = _resampled(np.stack([numerators, denominators]))
    low, high = np.quantile(found[0] / found[1], [0.025, 0.975])
    value = float(numerators.sum() / denominators.sum())
    return Score(value, float(low), float(high), len(numerators), share)


def mean(values: np.ndarray) -> Score:
    """The mean of one value in [0, 1] per item; Wilson's interval where all are 0 or 1."""
    if np.isin(values, (0, 1)).all():
        return wilson(int(values.sum()), len(values))
    if len(values) < 2:
        return Score(float(values[0]), 0.0, 1.0, 1)  # one item says nothing of the others
    return ratio(values, np.ones_like(values), share=True)


def paired_difference(first: np.ndarray, second: np.ndarray, *, share: bool) -> Score:
    """Second minus first, each (2, S): numerators and denominators of the same S items; bootstrap over the items."""
    a, b = np.split(_resampled(np.concatenate([first, second])), 2)
    low, high = np.quantile(b[0] / b[1] - a[0] / a[1], [0.025, 0.975])
    value = second[0].sum() / second[1].sum() - first[0].sum() / first[1].sum()
    return Score(float(value), float(low), float(high), first.shape[1], share)


def _resampled(rows: np.ndarray) -> np.ndarray:
    """Sums of each row (R, S) over S items drawn with replacement, RESAMPLES times: (R, RESAMPLES). Always the same
    draws for the same S, so that a report can be made again."""
    return np.concatenate([rows.astype(float) @ times.T for times in _times_drawn(rows.shape[1])], axis=1)


@lru_cache(maxsize=1)
def _times_drawn(count: int) -> list[np.ndarray]:
    """How often each of `count` items is drawn, (some, count) a part, RESAMPLES in all. Kept, because scores of the
    same items follow each other, and drawing takes longest."""
    random = np.random.default_rng(0)
    size = max(1, min(RESAMPLES, 20_000_000 // count))
    even = np.full(count, 1 / count)
    return [random.multinomial(count, even, size=min(size, RESAMPLES - start)) for start in range(0, RESAMPLES, size)]


def pass_at(k: int, samples: int, correct: int) -> float:
    """Unbiased estimate of P(at least one of k passes) from `correct` of `samples` (Chen et al. 2021, eq. 1)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


# The 97.5 % points of Student's t with 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def student(freedom: float) -> float:
    """The 97.5 % point of Student's t: by table, whole degrees of freedom; beyond it by a first-order expansion."""
    if freedom < len(_STUDENT) + 1:
        return _STUDENT[max(1, int(freedom)) - 1]
    return _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * freedom)


def seeds_to_settle(difference: Score, seeds: int, limit: int = 1000) -> int | None:
    """About how many paired seeds would separate a difference of this size from 0, if its spread stays what it is.

    None if it is separated already, or if not even `limit` would do. `difference` is over `seeds` of them.
    """
    half = (difference.high - difference.low) / 2
    if seeds < 2 or not half or abs(difference.value) > half:
        return None
    deviation = half / student(seeds - 1) * math.sqrt(seeds)
    for count in range(seeds + 1, limit + 1):
        if student(count - 1) * deviation / math.sqrt(count) < abs(difference.value):
            return count
    return None


FEW = 30  # items below which a mean over them decides little


def too_few(count: int) -> str:
    """What to say of a choice that rests on so many rows; empty if they are enough to say nothing."""
    if count >= FEW:
        return ""
    if not count:
        return "none, so nothing chooses best/ or between settings; set data.validation_fraction or data.validation"
    return f"{count} only; what is chosen by them is chosen by chance: give more ({FEW} at least, hundreds are better)"


def over_seeds(values: list[float], share: bool) -> Score:
    """The mean of one score over runs that differ in their seed; Student's interval, unbounded for a single run."""
    centre = float(np.mean(values))
    if len(values) < 2:
        return Score(centre, -math.inf, math.inf, 1, share)
    half = student(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    low, high = centre - half, centre + half
    if share:  # no proportion lies outside of these, whatever few runs say
        low, high = max(0.0, low), min(1.0, high)
    return Score(centre, low, high, len(values), share)


def difference_over_seeds(first: np.ndarray, second: np.ndarray, share: bool, paired: bool = False) -> Score:
    """Second minus first, each (seeds, 2, S): numerators and denominators of the same S items under each seed.

    The interval knows both that the test set is a sample and that a training run is one: the variance of the means'
    difference over resampled items (the same for both), plus each side's variance over its seeds, with Student's t at
    Welch and Satterthwaite's degrees of freedom. A side of a single run adds nothing: then it is about items only.
    `paired`: the runs of one place share their seed, so it is the variance of their differences that counts.
    """
    one = _score_of_each(first)
    two = _score_of_each(second)
    over_items = float(np.var(_resampled_mean(second) - _resampled_mean(first)))
    varying = [two - one] if paired else [one, two]
    over_runs = 0.0
    spread = 0.0  # what Welch and Satterthwaite divide by
    for scores in varying:
        if len(scores) > 1:
            of_mean = float(np.var(scores, ddof=1)) / len(scores)
            over_runs += of_mean
            spread += of_mean**2 / (len(scores) - 1)
    variance = over_items + over_runs
    freedom = variance**2 / spread if spread else math.inf
    half = student(freedom) * math.sqrt(variance)
    value = float(two.mean() - one.mean())
    return Score(value, value - half, value + half, first.shape[-1], share)


def _score_of_each(runs: np.ndarray) -> np.ndarray:
    """(seeds, 2, S) numerators and denominators -> (seeds,)."""
    sums = runs.sum(-1)  # (seeds, 2)
    return sums[:, 0] / sums[:, 1]


def _resampled_mean(runs: np.ndarray) -> np.ndarray:
    """(seeds, 2, S) -> the mean over seeds under each drawing of the items, (RESAMPLES,)."""
    seeds, _, items = runs.shape
    sums = _resampled(runs.reshape(-1, items)).reshape(seeds, 2, -1)  # (seeds, 2, RESAMPLES)
    return (sums[:, 0] / sums[:, 1]).mean(0)
