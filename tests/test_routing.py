"""Routing mathematics against brute force."""

import itertools
import math

import pytest
import torch
from conftest import close

from remix_cli.adapter import routing

SIZES = [(4, 1), (4, 2), (5, 3), (6, 4), (8, 4), (4, 4)]


def logits_of(n: int, rows: int = 3, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, n, dtype=torch.float64) * spread


def sequential_log_prob(logits: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The paper's formula, literally."""
    q, taken, total = logits.softmax(-1), torch.zeros(logits.shape[0], dtype=logits.dtype), 0.0
    for i in order:
        total = total + q[:, i].log() - (1 - taken).log()
        taken = taken + q[:, i]
    return total


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_ordered_log_prob_is_the_papers_formula(n, k):
    logits = logits_of(n)
    for order in itertools.islice(itertools.permutations(range(n), k), 50):
        ours = routing.ordered_log_prob(logits, torch.tensor(order).expand(3, k))
        assert close(ours, sequential_log_prob(logits, order), 1e-10)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_set_probability_sums_its_orders_and_all_sets_sum_to_one(n, k):
    logits = logits_of(n)
    total = torch.zeros(3, dtype=torch.float64)
    for chosen in itertools.combinations(range(n), k):
        ours = routing.set_log_prob(logits, torch.tensor(chosen).expand(3, k)).exp()
        orders = itertools.permutations(chosen)
        assert close(ours, sum(sequential_log_prob(logits, o).exp() for o in orders), 1e-10)
        total += ours
    assert close(total, torch.ones_like(total), 1e-12)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_inclusion_probabilities_sum_the_sets_that_hold_the_item(n, k):
    logits = logits_of(n)
    expected = torch.zeros_like(logits)
    for chosen in itertools.combinations(range(n), k):
        expected[:, list(chosen)] += routing.set_log_prob(logits, torch.tensor(chosen).expand(3, k)).exp()[:, None]
    assert close(routing.inclusion_probabilities(logits, k), expected, 1e-12)


def test_scores_stay_finite_and_have_gradients_for_a_saturated_router():
    """Logit gaps that make 1 - q vanish in float32."""
    logits = torch.tensor([[0.0, -40.0, -90.0, -200.0]], requires_grad=True)
    chosen = torch.tensor([[0, 2]])
    values = [
        routing.ordered_log_prob(logits, chosen),
        routing.set_log_prob(logits, chosen),
        routing.inclusion_probabilities(logits, 2)[:, 1],
    ]
    for value in values:
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
    assert abs(values[0].item() + 50) < 1e-3  # -90 drawn while -40 was there
    assert abs(values[2].item() - 1) < 1e-6


def test_sampled_frequencies_match_the_set_probabilities():
    logits, k, draws = logits_of(4, rows=1, spread=1.0).float(), 2, 200_000
    noise = routing.gumbel_noise(torch.arange(draws), 1, 4)[0]
    chosen = routing.top_k(logits + noise, k).sort(-1).values
    for pair in itertools.combinations(range(4), k):
        p = routing.set_log_prob(logits, torch.tensor([pair])).exp().item()
        seen = (chosen == torch.tensor(pair)).all(-1).float().mean().item()
        assert abs(seen - p) < 5 * math.sqrt(p * (1 - p) / draws)


def test_noise_is_a_function_of_the_key_and_fills_its_distribution():
    key = torch.arange(50_000)
    noise = routing.gumbel_noise(key, 2, 4)
    assert torch.equal(noise[:, 7], routing.gumbel_noise(key[7:8], 2, 4)[:, 0])
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02
    flat = noise.movedim(0, -1).reshape(len(key), -1).T
    correlation = torch.corrcoef(flat) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(len(key))


def test_entropy_and_support_size_by_hand():
    uniform, peaked = torch.zeros(8), torch.tensor([50.0] + [0.0] * 7)
    assert routing.entropy(uniform).item() == pytest.approx(math.log(8), rel=1e-6)
    assert routing.entropy(peaked).item() == pytest.approx(0, abs=1e-6)
    assert routing.effective_support_size(torch.tensor([0.5, 0.5, 0.0, 0.0])).item() == 2
    assert routing.effective_support_size(torch.tensor([3.0, 1.0])).item() == pytest.approx(1.6)


def test_sizes_beyond_the_recursions_are_refused():
    with pytest.raises(ValueError, match="k <= 8"):
        routing.set_log_prob(torch.zeros(1, 12), torch.arange(9).unsqueeze(0))
    with pytest.raises(ValueError, match="sets"):
        routing.inclusion_probabilities(torch.zeros(1, 64), 8)
