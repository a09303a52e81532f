"""Routing mathematics against brute force."""

import itertools
import math

import pytest
import torch
from helpers.common import close

from remix_cli.core import routing
from remix_cli.core.quadrature import inclusion_by_quadrature

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


@pytest.mark.parametrize(("n", "k"), [(8, 1), (8, 4), (8, 7), (9, 5)])
@pytest.mark.parametrize(("spread", "error"), [(1.0, 1e-12), (10.0, 1e-12), (40.0, 1e-7)])
def test_quadrature_agrees_with_the_sum_over_sets(n, k, spread, error):
    """Values and gradients, absolutely; logits uniform over `spread` nats."""
    logits = (torch.rand(32, n, dtype=torch.float64) * spread).requires_grad_()
    weight = torch.randn(32, n, dtype=torch.float64)
    exact, ours = routing.inclusion_probabilities(logits, k), inclusion_by_quadrature(logits, k)
    assert (exact - ours).abs().max() < error
    slopes = [torch.autograd.grad((x * weight).sum(), logits)[0] for x in (exact, ours)]
    assert (slopes[0] - slopes[1]).abs().max() < 30 * error


def test_large_pools_go_to_quadrature():
    """n = 64, k = 8: the sum is k, frequencies of draws agree, one gradient agrees with a difference quotient."""
    logits = (torch.randn(2, 64, dtype=torch.float64) * 2).requires_grad_()
    pi = routing.inclusion_probabilities(logits, 8)
    assert close(pi.sum(-1), torch.full((2,), 8.0, dtype=torch.float64), 1e-12)
    draws = 20_000
    noise = routing.gumbel_noise(torch.arange(draws), 1, 64)[0]
    for row, expected in zip(logits.detach().float(), pi.detach(), strict=True):
        seen = routing.selection_mask(routing.top_k(row + noise, 8), 64).double().mean(0)
        assert (seen - expected).abs().max() < 5 * math.sqrt(0.25 / draws)
    (slope,) = torch.autograd.grad(pi[0, 3], logits)
    moved = logits.detach().clone()
    moved[0, 5] += 1e-6
    quotient = (routing.inclusion_probabilities(moved, 8)[0, 3] - pi[0, 3]) / 1e-6
    assert abs(quotient - slope[0, 5]) < 1e-6 * slope[0].abs().max()


def test_quadrature_of_a_saturated_router_is_finite_and_decided():
    logits = torch.tensor([[0.0, -60.0, -150.0, -400.0]], requires_grad=True)
    pi = inclusion_by_quadrature(logits, 2)
    assert close(pi, torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64), 1e-7)
    (slope,) = torch.autograd.grad(pi[0, 1], logits)
    assert torch.isfinite(slope).all()


def test_sets_beyond_the_recursion_are_refused():
    with pytest.raises(ValueError, match="k <= 8"):
        routing.set_log_prob(torch.zeros(1, 12), torch.arange(9).unsqueeze(0))


def test_many_tokens_go_in_pieces_that_keep_nothing_for_the_backward_pass(monkeypatch):
    """Values and gradients of the recursions as in one piece; what autograd keeps is the inputs alone."""
    logits = torch.randn(3, 5, 7, 6, dtype=torch.float64)
    chosen = routing.top_k(torch.randn(3, 5, 7, 6), 3)
    weights = torch.randn(3, 5, 7, 6, dtype=torch.float64)

    def run():
        kept = []

        def pack(tensor):
            kept.append(tensor.numel())
            return tensor

        x = logits.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            pi, log_prob = routing.inclusion_probabilities(x, 3), routing.set_log_prob(x, chosen)
        (gradient,) = torch.autograd.grad((pi * weights).sum() + log_prob.sum(), x)
        return pi, log_prob, gradient, sum(kept)

    whole = run()
    monkeypatch.setattr(routing, "SUBSETS_AT_ONCE", 22 * 10)  # ten tokens at once of 105
    pieces = run()
    for a, b in zip(pieces[:3], whole[:3], strict=True):
        assert close(a, b, 1e-12)
    assert pieces[3] < whole[3] / 4
