"""How sure a score is: intervals for one model, paired differences between two on the same items."""

import math
from collections.abc import Sequence
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
    low, high = _wilson(hits / count, count, _NORMAL)
    return Score(hits / count, low, high, count)


def _wilson(p: float, count: float, z: float) -> tuple[float, float]:
    """`count` need not be whole; `z`: the quantile."""
    centre = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


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
    """Second minus first, each (2, S): numerators and denominators of the same S items; bootstrap over the items.

    Of shares as `difference_over_seeds` of one run each, which stays sensible where items are few or all agree.
    """
    if share:
        return difference_over_seeds(first[None], second[None], share=True).score
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


FEW = 30  # items below which a mean over them decides little


def too_few(count: int) -> str:
    """What to say of a choice that rests on so many rows; empty if they are enough to say nothing."""
    if count >= FEW:
        return ""
    if not count:
        return "none, so nothing chooses best/ or between settings; set data.validation_fraction or data.validation"
    more = "data.validation_fraction or data.validation"
    return f"{count} only, so what they choose is chosen by chance: {FEW} at least, better hundreds ({more})"


@dataclass(frozen=True)
class Spread:
    """What another seed changes a run's score by, learnt from all arms together: each alone has few seeds."""

    variance: float  # of a single run
    freedom: float  # degrees of freedom of that estimate

    @classmethod
    def within(cls, arms: Sequence[np.ndarray]) -> "Spread | None":
        """From each arm's scores (seeds,) around their own mean; None if no arm has two."""
        freedom = sum(len(scores) - 1 for scores in arms)
        if not freedom:
            return None
        squares = sum(float(((scores - scores.mean()) ** 2).sum()) for scores in arms)
        return cls(squares / freedom, freedom)

    @classmethod
    def paired(cls, scores: np.ndarray) -> "Spread | None":
        """From scores (arms, seeds), every arm under the same seeds: what is left when arm and seed are taken out.

        The residual of a two-way analysis of variance. None for one arm or one seed.
        """
        arms, seeds = scores.shape
        freedom = (arms - 1) * (seeds - 1)
        if not freedom:
            return None
        left = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
        return cls(float((left**2).sum()) / freedom, freedom)


@dataclass(frozen=True)
class Variance:
    """Of a mean over runs, or of the difference of two: what it would vary by with other items, and other seeds."""

    items: float
    runs: float = 0.0
    freedom: float = math.inf  # of `runs`

    @property
    def total(self) -> float:
        return self.items + self.runs

    @property
    def half_width(self) -> float:
        """Each part at its own quantile: normal for the items, which are many, Student's t for the runs, which are few.

        Welch and Satterthwaite's degrees of freedom of the sum would trust two runs as soon as the items vary more:
        their variance is then a guess, but counts as one of many.
        """
        if not self.runs:
            return _NORMAL * math.sqrt(self.items)
        return math.hypot(_NORMAL * math.sqrt(self.items), student(self.freedom) * math.sqrt(self.runs))

    @property
    def quantile(self) -> float:
        """By which a standard error is to be multiplied for that."""
        return self.half_width / math.sqrt(self.total) if self.total else _NORMAL


@dataclass(frozen=True)
class SeedDifference:
    """How far two arms are apart, and what would make it surer."""

    score: Score
    variance: Variance
    seeds: int  # of the arm that has fewer

    @property
    def is_clear(self) -> bool:
        return not self.score.low <= 0 <= self.score.high

    def seeds_to_settle(self, limit: int = 1000) -> int | None:
        """About how many seeds would separate a difference of this size from 0, items and spread as they are.

        None under one seed, and if not even `limit` would do.
        """
        if self.seeds < 2:
            return None
        for count in range(self.seeds + 1, limit + 1):
            freedom = self.variance.freedom * (count - 1) / (self.seeds - 1)
            with_more = Variance(self.variance.items, self.variance.runs * self.seeds / count, freedom)
            if with_more.half_width < abs(self.score.value):
                return count
        return None

    def items_to_settle(self, limit: int = 100) -> int | None:
        """The same of items, seeds as they are; None if not even `limit` times as many would do."""
        for times in range(2, limit + 1):
            with_more = Variance(self.variance.items / times, self.variance.runs, self.variance.freedom)
            if with_more.half_width < abs(self.score.value):
                return times * self.score.count
        return None


def score_over_seeds(runs: np.ndarray, share: bool, spread: Spread | None = None) -> Score:
    """The mean of one score over runs (seeds, 2, S) that differ in their seed: numerators, denominators of S items.

    The interval knows that the items are a sample and, where there is a `spread` of runs, that a run is one.
    """
    value = float(_score_of_each(runs).mean())
    variance = _variance(_resampled_mean(runs), spread, 1 / len(runs))
    low, high = value - variance.half_width, value + variance.half_width
    if share:
        low, high = _around_share(value, variance.total, runs.shape[-1], variance.quantile)
    return Score(value, low, high, len(runs), share)


def difference_over_seeds(
    first: np.ndarray, second: np.ndarray, share: bool, spread: Spread | None = None
) -> SeedDifference:
    """Second minus first, each (seeds, 2, S): numerators and denominators of the same S items under each seed.

    The interval knows that the test set is a sample and that a training run is one: the variance of the means'
    difference over resampled items (the same for both), plus what seeds add. `spread` is that of one run, without what
    both have from their seed if they share it; without a spread the interval is about items only.

    A difference of shares has Newcombe's interval (1998, method 10), made from those of both shares and how far they go
    together: it stays within [-1, 1], and does not collapse where few items all agree.
    """
    one, two = float(_score_of_each(first).mean()), float(_score_of_each(second).mean())
    drawn_one, drawn_two = _resampled_mean(first), _resampled_mean(second)
    variance = _variance(drawn_two - drawn_one, spread, 1 / len(first) + 1 / len(second))
    value, items = two - one, first.shape[-1]
    low, high = value - variance.half_width, value + variance.half_width
    if share:
        of_one = _variance(drawn_one, spread, 1 / len(first)).total
        of_two = _variance(drawn_two, spread, 1 / len(second)).total
        together = _correlation(of_one, of_two, variance.total, items)
        low_one, high_one = _around_share(one, of_one, items, variance.quantile)
        low_two, high_two = _around_share(two, of_two, items, variance.quantile)
        low = value - _third_side(two - low_two, high_one - one, together)
        high = value + _third_side(high_two - two, one - low_one, together)
    return SeedDifference(Score(value, low, high, items, share), variance, min(len(first), len(second)))


def _variance(drawn: np.ndarray, spread: Spread | None, runs: float) -> Variance:
    """Of a mean whose values under resampled items are `drawn`; `runs`: the spread's share in it, 1 / n for n runs."""
    items = float(np.var(drawn))
    if spread is None:
        return Variance(items)
    return Variance(items, spread.variance * runs, spread.freedom)


def _around_share(value: float, variance: float, items: int, quantile: float) -> tuple[float, float]:
    """Wilson's interval at so many items as would have this variance, at most those that there are."""
    count: float = items
    if variance > 0 and 0 < value < 1:
        count = min(items, value * (1 - value) / variance)
    return _wilson(value, count, quantile)


def _correlation(one: float, two: float, difference: float, items: int) -> float:
    """Of two means by their variances and that of their difference, with Newcombe's correction for few items."""
    if not one * two:
        return 0.0
    covariance = (one + two - difference) / 2
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * items**2))
    return max(-1.0, min(1.0, covariance / math.sqrt(one * two)))


def _third_side(one: float, two: float, cosine: float) -> float:
    """Of a triangle: how two errors add up that go together so far."""
    return math.sqrt(max(0.0, one**2 - 2 * cosine * one * two + two**2))


def _score_of_each(runs: np.ndarray) -> np.ndarray:
    """(seeds, 2, S) numerators and denominators -> (seeds,)."""
    sums = runs.sum(-1)  # (seeds, 2)
    return sums[:, 0] / sums[:, 1]


def _resampled_mean(runs: np.ndarray) -> np.ndarray:
    """(seeds, 2, S) -> the mean over seeds under each drawing of the items, (RESAMPLES,)."""
    seeds, _, items = runs.shape
    sums = _resampled(runs.reshape(-1, items)).reshape(seeds, 2, -1)  # (seeds, 2, RESAMPLES)
    return (sums[:, 0] / sums[:, 1]).mean(0)
