"""Intervals, paired differences and pass@k against what is known of them."""

import math
from itertools import combinations

import numpy as np
import pytest

from remix_cli.evaluate.statistics import mean, paired_difference, pass_at, ratio, wilson


def test_wilson_is_the_published_interval():
    """Newcombe 1998, table I: 81 of 263; and 0 of 10, where the simple interval has no width."""
    found = wilson(81, 263)
    assert [found.low, found.high] == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert wilson(0, 10).low == 0
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 5, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n, c, k):
    subsets = list(combinations(range(n), k))
    wanted = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
    assert pass_at(k, n, c) == pytest.approx(wanted, rel=1e-12)


def test_bootstrap_intervals_are_as_wide_as_theory_says():
    random = np.random.default_rng(1)
    nats, tokens = random.gamma(2, 2, 400), random.integers(1, 9, 400).astype(float)
    found = ratio(nats, tokens, share=False)
    value = nats.sum() / tokens.sum()
    error = 1.96 * np.std(nats - value * tokens) / tokens.mean() / math.sqrt(400)  # the delta method
    assert found.value == pytest.approx(value, rel=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(error, rel=0.1)
    assert ratio(nats, tokens, share=False) == found


def test_paired_differences_see_what_separate_intervals_cannot():
    random = np.random.default_rng(2)
    nats = random.gamma(2, 2, 200)
    ones = np.ones(200)
    found = paired_difference(np.stack([nats, ones]), np.stack([nats - 0.01, ones]))
    assert found.value == pytest.approx(-0.01)
    assert found.low < found.high < 0
    same = paired_difference(np.stack([nats, ones]), np.stack([nats, ones]))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_means_of_shares_stay_shares():
    assert mean(np.array([0.0, 1.0, 1.0])).value == pytest.approx(2 / 3)
    assert mean(np.array([0.0, 0.2, 1.0])).low >= 0
    assert (mean(np.array([0.3])).low, mean(np.array([0.3])).high) == (0, 1)
