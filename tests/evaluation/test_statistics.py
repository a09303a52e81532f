"""Intervals, paired differences and pass@k against what is known of them."""

import math
from itertools import combinations

import numpy as np
import pytest

from remix_cli.evaluation.statistics import (
    Spread,
    Variance,
    difference_over_seeds,
    mean,
    paired_difference,
    pass_at,
    ratio,
    score_over_seeds,
    student,
    too_few,
    wilson,
)


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


def losses_of(runs):
    return runs[:, 0].sum(-1) / runs[:, 1].sum(-1)


def test_arms_that_share_their_seeds_are_compared_seed_by_seed():
    """Seeds that move both arms alike say nothing of the difference; without pairing they hide it."""
    seeds = np.array([1.0, 1.2, 0.9, 1.1])
    one, two = runs_of(seeds), runs_of(seeds - 0.02 + np.array([0.001, -0.001, 0.0005, -0.0005]))
    both = [losses_of(one), losses_of(two)]
    paired = difference_over_seeds(one, two, share=False, spread=Spread.paired(np.stack(both))).score
    assert paired.value == pytest.approx(-0.02, abs=1e-9)
    assert paired.high < 0
    apart = difference_over_seeds(one, two, share=False, spread=Spread.within(both)).score
    assert apart.value == pytest.approx(paired.value)
    assert apart.low < -0.1 < 0.1 < apart.high
    # by hand: items cancel, so it is Student's interval of the four differences
    half = student(3) * np.std([0.001, -0.001, 0.0005, -0.0005], ddof=1) / 2
    assert paired.high - paired.low == pytest.approx(2 * half, rel=1e-6)


def test_what_seeds_vary_by_is_learnt_from_all_arms():
    """A two-way analysis of variance by hand; two seeds of five arms tell more than two of two."""
    scores = np.array([[1.0, 1.3], [2.0, 2.1], [3.0, 3.2]])
    found = Spread.paired(scores)
    differences = scores[:, 1] - scores[:, 0]
    assert (found.variance, found.freedom) == (pytest.approx(np.var(differences, ddof=1) / 2), 2)
    within = Spread.within(list(scores))
    assert (within.variance, within.freedom) == (pytest.approx((differences**2).sum() / 2 / 3), 3)
    assert Spread.paired(scores[:, :1]) is None
    assert Spread.within([np.array([1.0])]) is None


def test_how_much_more_would_settle_a_difference():
    """Seeds where they are what varies, items where these are, neither where both would have to be endless."""
    seeds = np.array([0.0, 0.02, -0.02, 0.01])
    one, two = runs_of(np.ones(4)), runs_of(1.01 + seeds)
    spread = Spread.paired(np.stack([losses_of(one), losses_of(two)]))
    unclear = difference_over_seeds(one, two, share=False, spread=spread)
    assert not unclear.is_clear
    count, value = unclear.seeds_to_settle(), abs(unclear.score.value)
    deviation = np.std(seeds, ddof=1)
    assert student(count - 1) * deviation / count**0.5 < value <= student(count - 2) * deviation / (count - 1) ** 0.5
    assert unclear.items_to_settle() is None
    noise = np.random.default_rng(3).normal(0.01, 0.3, 200)
    other = one.copy()
    other[:, 0] += noise
    by_items = difference_over_seeds(one, other, share=False, spread=Spread(0.0, 3))
    assert by_items.seeds_to_settle() is None
    assert by_items.items_to_settle() % 200 == 0
    single = difference_over_seeds(one[:1], other[:1], share=False)
    assert single.seeds_to_settle() is None


def answers(random, arms, seeds, items, easiness=0.5, spread=0.05):
    """(arms, seeds, 2, S): right or wrong, by how hard an item is and what a seed makes of a run."""
    hard = random.beta(2, 2, items) * 2 * easiness
    shift = spread * random.standard_normal((arms, seeds, 1))
    right = (random.random((arms, seeds, items)) < np.clip(hard + shift, 0, 1)).astype(float)
    return np.stack([right, np.ones_like(right)], 2)


@pytest.mark.parametrize("items", [1, 2, 5, 40])
@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("easiness", [0.0, 0.2, 0.5])
def test_no_share_and_no_difference_of_shares_is_impossible(items, seeds, easiness):
    """Two seeds of a share near 5 % had intervals such as -58 to 68 %."""
    random = np.random.default_rng(items)
    for _ in range(5):
        runs = answers(random, 2, seeds, items, easiness, spread=0.2)
        means = runs[:, :, 0].mean(-1)
        score = score_over_seeds(runs[0], share=True, spread=Spread.within(list(means)))
        assert 0 <= score.low <= score.value <= score.high <= 1
        assert score.low < score.high
        found = difference_over_seeds(runs[0], runs[1], share=True, spread=Spread.paired(means)).score
        assert -1 <= found.low <= found.value <= found.high <= 1
        assert found.low < found.high


def test_two_seeds_of_five_arms_give_intervals_one_can_use():
    """On average: two seeds of two arms alone have one degree of freedom, and Student's t at it is 12.7."""
    random = np.random.default_rng(0)
    together, alone = [], []
    for _ in range(20):
        runs = answers(random, 5, 2, 200, spread=0.05)
        means = runs[:, :, 0].mean(-1)
        for found, spread in ((together, Spread.paired(means)), (alone, Spread.paired(means[:2]))):
            score = difference_over_seeds(runs[0], runs[1], share=True, spread=spread).score
            found.append(score.high - score.low)
    assert np.mean(together) < 0.4
    assert np.mean(together) < 0.6 * np.mean(alone)


def test_few_items_that_all_agree_are_no_certainty():
    """Right in 10 of 10 on both sides: Wilson's interval of that reaches down to 0.7225."""
    right = np.stack([np.ones(10), np.ones(10)])[None]
    found = difference_over_seeds(right, right, share=True).score
    assert (found.value, found.high) == (0, -found.low)
    assert found.high == pytest.approx(0.2775, abs=1e-3)
    assert paired_difference(right[0], right[0], share=True).low == found.low


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (5, 2)])
def test_the_difference_over_seeds_covers_as_often_as_it_says(arms, seeds):
    """200 sets of equal arms: items in common, seeds apart."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        items = random.random(50)
        made = (
            items + 0.05 * random.standard_normal((arms, seeds, 1)) + 0.02 * random.standard_normal((arms, seeds, 50))
        )
        runs = np.stack([made, np.ones_like(made)], 2)
        spread = Spread.within(list(made.mean(-1)))
        hits += not difference_over_seeds(runs[0], runs[1], share=False, spread=spread).is_clear
    assert 0.91 <= hits / 200 <= 0.995


def test_a_mean_over_seeds_has_the_interval_of_its_items_and_its_seeds():
    runs = runs_of([1.0, 2.0, 3.0])
    spread = Spread.within([losses_of(runs)])
    found = score_over_seeds(runs, share=False, spread=spread)
    assert (found.value, found.count) == (pytest.approx(2.0, abs=1e-2), 3)
    assert found.high - found.value == pytest.approx(student(2) / 3**0.5, rel=1e-3)
    single = score_over_seeds(runs[:1], share=False)
    assert single.high - single.low == pytest.approx(2 * 1.96 * 0.01 / 200**0.5, rel=0.1)


def test_quantiles_of_t():
    assert student(16) == pytest.approx(2.120, abs=0.015)
    assert student(60) == pytest.approx(2.000, abs=0.005)


@pytest.mark.parametrize(("rows", "said"), [(0, "none"), (2, "2 only"), (29, "29 only"), (30, "")])
def test_a_choice_by_few_rows_says_so(rows, said):
    assert too_few(rows).startswith(said)
    assert bool(too_few(rows)) == bool(said)


def test_two_runs_are_trusted_no_more_because_the_items_vary():
    """With one degree of freedom the runs' part alone has Student's t of 12.7; items can only widen it."""
    runs = Variance(0.0, 1.0, freedom=1)
    for items in (0.1, 1.0, 20.0):
        both = Variance(items, 1.0, freedom=1)
        assert both.half_width > runs.half_width > 12.7
        assert both.half_width < runs.half_width + Variance(items).half_width
    assert Variance(1.0, 1.0, freedom=1e6).half_width == pytest.approx(1.96 * 2**0.5, rel=1e-3)
