"""How sure a score is: intervals for one model, paired differences between two on the same items."""

import math
from dataclasses import dataclass

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


def paired_difference(first: np.ndarray, second: np.ndarray) -> Score:
    """Second minus first, each (2, S): numerators and denominators of the same S items; bootstrap over the items."""
    a, b = np.split(_resampled(np.concatenate([first, second])), 2)
    low, high = np.quantile(b[0] / b[1] - a[0] / a[1], [0.025, 0.975])
    value = second[0].sum() / second[1].sum() - first[0].sum() / first[1].sum()
    return Score(float(value), float(low), float(high), first.shape[1])


def _resampled(rows: np.ndarray) -> np.ndarray:
    """Sums of each row (R, S) over S items drawn with replacement, RESAMPLES times: (R, RESAMPLES). Always the same
    draws for the same S, so that a report can be made again."""
    count = rows.shape[1]
    random = np.random.default_rng(0)
    size = max(1, min(RESAMPLES, 20_000_000 // count))
    parts = []
    for start in range(0, RESAMPLES, size):
        times = random.multinomial(count, np.full(count, 1 / count), size=min(size, RESAMPLES - start))
        parts.append(rows.astype(float) @ times.T)
    return np.concatenate(parts, axis=1)


def pass_at(k: int, samples: int, correct: int) -> float:
    """Unbiased estimate of P(at least one of k passes) from `correct` of `samples` (Chen et al. 2021, eq. 1)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))
