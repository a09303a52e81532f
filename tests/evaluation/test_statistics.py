"""Intervals, paired differences and pass@k against what is known of them."""

import math
from itertools import combinations

import numpy as np
import pytest

from remix_cli.evaluation.statistics import (
    Score,
    difference_over_seeds,
    mean,
    over_seeds,
    paired_difference,
    pass_at,
    ratio,
    seeds_to_settle,
    student,
    too_few,
    wilson,
)
from remix_cli.sweep.record import SearchedPoint
from remix_cli.sweep.report import edges, verdict


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
    found = paired_difference(np.stack([nats, ones]), np.stack([nats - 0.01, ones]), share=False)
    assert found.value == pytest.approx(-0.01)
    assert found.low < found.high < 0
    same = paired_difference(np.stack([nats, ones]), np.stack([nats, ones]), share=False)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_means_of_shares_stay_shares():
    assert mean(np.array([0.0, 1.0, 1.0])).value == pytest.approx(2 / 3)
    assert mean(np.array([0.0, 0.2, 1.0])).low >= 0
    assert (mean(np.array([0.3])).low, mean(np.array([0.3])).high) == (0, 1)


def runs_of(losses, items=200, seed=0):
    """(seeds, 2, S): one run a loss, on the same items."""
    noise = np.random.default_rng(seed).normal(0, 0.01, items)
    return np.stack([np.stack([loss + noise, np.ones(items)]) for loss in losses])


def test_arms_that_share_their_seeds_are_compared_seed_by_seed():
    """Seeds that move both arms alike say nothing of the difference; without pairing they hide it."""
    seeds = np.array([1.0, 1.2, 0.9, 1.1])
    one, two = runs_of(seeds), runs_of(seeds - 0.02 + np.array([0.001, -0.001, 0.0005, -0.0005]))
    paired = difference_over_seeds(one, two, share=False, paired=True)
    assert paired.value == pytest.approx(-0.02, abs=1e-9)
    assert paired.high < 0
    apart = difference_over_seeds(one, two, share=False)
    assert apart.value == pytest.approx(paired.value)
    assert apart.low < -0.1 < 0.1 < apart.high
    # by hand: items cancel, so it is Student's interval of the four differences
    half = student(3) * np.std([0.001, -0.001, 0.0005, -0.0005], ddof=1) / 2
    assert paired.high - paired.low == pytest.approx(2 * half, rel=1e-6)


def test_how_many_seeds_would_settle_a_difference():
    unclear = Score(-0.01, -0.03, 0.01, 100, share=False)
    count = seeds_to_settle(unclear, 4)
    deviation = 0.02 / student(3) * 2
    assert student(count - 1) * deviation / count**0.5 < 0.01 <= student(count - 2) * deviation / (count - 1) ** 0.5
    assert seeds_to_settle(Score(-0.01, -0.015, -0.005, 100, share=False), 4) is None
    assert seeds_to_settle(Score(1e-9, -1, 1, 100, share=False), 4) is None


@pytest.mark.parametrize(
    ("score", "low_is_better", "seeds", "said"),
    [
        (Score(-0.012, -0.018, -0.006, 9, share=False), True, 5, "better by 0.0120 (0.0060 to 0.0180)"),
        (Score(0.012, 0.006, 0.018, 9, share=False), True, 5, "worse by 0.0120 (0.0060 to 0.0180)"),
        (Score(0.02, 0.01, 0.03, 9, share=True), False, 5, "better by 2.00 points (1.00 to 3.00)"),
        (Score(0.02, 0.01, 0.03, 9, share=True), False, 1, "(1.00 to 3.00, under one seed)"),
        (Score(-0.003, -0.01, 0.004, 9, share=False), True, 3, "no clear difference; about"),
        (Score(-0.003, -0.01, 0.004, 9, share=False), True, 1, "under one seed; sweep.seeds"),
    ],
)
def test_verdicts_are_sentences(score, low_is_better, seeds, said):
    assert said in verdict(score, low_is_better, seeds, paired=seeds > 1)


def test_a_best_value_at_the_end_of_its_grid_is_marked():
    rates = {1e-3: 2.0, 3e-3: 1.0, 1e-2: 3.0}
    searched = [SearchedPoint({"train.learning_rate": rate, "x": "a"}, "r", value) for rate, value in rates.items()]
    assert edges(searched, {"train.learning_rate": 3e-3, "x": "a"}) == []
    assert edges(searched, {"train.learning_rate": 1e-2}) == ["learning_rate=0.01"]
    failed = [*searched[:2], SearchedPoint({"train.learning_rate": 1e-2}, "r", None)]
    assert edges(failed, {"train.learning_rate": 3e-3}) == ["learning_rate=0.003"]
    assert edges(searched[:1], {"train.learning_rate": 1e-3}) == []


def test_an_interval_of_a_share_stays_within_0_and_1():
    found = over_seeds([0.02, 0.1], share=True)
    assert (found.low, found.high < 1) == (0.0, True)
    assert over_seeds([0.02, 0.1], share=False).low < 0


@pytest.mark.parametrize(("rows", "said"), [(0, "none"), (2, "2 only"), (29, "29 only"), (30, "")])
def test_a_choice_by_few_rows_says_so(rows, said):
    assert too_few(rows).startswith(said)
    assert bool(too_few(rows)) == bool(said)
