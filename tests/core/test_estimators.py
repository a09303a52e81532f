"""The router's gradient against exact enumeration of every selection (float64), and that breakage is seen."""

import json
import sys
from functools import partial

import pytest
import torch
from helpers.common import close

from remix_cli import cli
from remix_cli.core.config import AdapterConfig
from remix_cli.core.estimators import control_variate, paper, rollouts, rtg
from remix_cli.core.estimators.control_variate import ControlVariate
from remix_cli.core.estimators.registry import ESTIMATORS, make_estimator
from remix_cli.core.estimators.rollouts import Rollouts, leave_one_out, reward_to_go
from remix_cli.verify import testbed
from remix_cli.verify.exact import TOLERANCE, Enumeration
from remix_cli.verify.variance import variance_ratios


@pytest.fixture(scope="module")
def sets():
    """Two routed layers, k = 3 of 4, sets enumerated: 256 joint selections, 65,536 pairs."""
    return Enumeration(3, ordered=False)


@pytest.fixture(scope="module")
def orders():
    """One routed layer, k = 2 of 4, draws enumerated in order: 144 joint selections, 20,736 pairs."""
    return Enumeration(2, ordered=True)


def test_probabilities_of_all_joint_selections_sum_to_one(sets, orders):
    for enumeration in (sets, orders):
        assert abs(enumeration.probability.sum().item() - 1) < 1e-12


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("rtg", {}),
        ("control_variate", {"beta": 0.0}),
        ("control_variate", {"beta": 0.5}),
        ("control_variate", {"beta": 1.0}),
        ("control_variate", {"beta": 0.5, "one_backward": True}),
    ],
    ids=str,
)
def test_mean_over_all_pairs_is_the_gradient_of_the_expected_loss(sets, estimator, options):
    assert sets.relative_bias(sets.mean_estimate(estimator, **options)) < TOLERANCE


@pytest.mark.parametrize("estimator", ["paper", "rtg", "control_variate"])
def test_the_same_over_all_ordered_draws(orders, estimator):
    assert orders.relative_bias(orders.mean_estimate(estimator, beta=0.7)) < TOLERANCE


@pytest.mark.parametrize(("estimator", "beta"), [("rtg", 0.0), ("control_variate", 1.0)])
def test_the_same_when_routing_by_sequence(estimator, beta, monkeypatch):
    """Two sequences, two layers, one selection for each: 81 joint selections. Crediting the other sequence is seen."""
    whole = Enumeration(2, ordered=False, n=3, level="sequence")
    assert whole.relative_bias(whole.mean_estimate(estimator, beta=beta)) < TOLERANCE
    swapped = rollouts.reachable_returns
    for module in (rtg, control_variate):
        monkeypatch.setattr(module, "reachable_returns", lambda *a: swapped(*a).flip(2))
    assert whole.relative_bias(whole.mean_estimate(estimator, beta=beta)) > 0.1


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("estimator", "beta"), [("rtg", 0.0), ("control_variate", 0.7)])
def test_the_same_with_one_router_of_the_model(estimator, beta, level, monkeypatch):
    """Its one choice answers for what both layers make of it."""
    monkeypatch.setattr(testbed, "AdapterConfig", partial(AdapterConfig, scope="model"))
    whole = Enumeration(2, ordered=False, n=3, level=level)
    assert len(whole.bed.routers) == 1
    assert len(whole.bed.adapter.linears) == 6
    assert whole.relative_bias(whole.mean_estimate(estimator, beta=beta)) < TOLERANCE


def test_straight_through_is_biased_as_it_says(sets):
    assert 0.01 < sets.relative_bias(sets.mean_straight_through()) < 0.9
    assert not ESTIMATORS["straight_through"].unbiased


def shifted(losses):
    """A label shift: decisions at s credited with losses from s + 1 on."""
    later = torch.cat([losses[..., 1:], torch.zeros_like(losses[..., :1])], dim=-1)
    return later.flip(-1).cumsum(-1).flip(-1)


def test_a_label_shift_of_one_is_caught(sets, monkeypatch):
    monkeypatch.setattr(rollouts, "reward_to_go", shifted)
    assert sets.relative_bias(sets.mean_estimate("rtg")) > 0.05


def test_local_credit_in_a_layer_that_attention_follows_is_caught(sets, monkeypatch):
    monkeypatch.setattr(sets.bed, "local", torch.tensor([True, True]))
    assert sets.relative_bias(sets.mean_estimate("rtg")) > 1e-4


def test_a_missing_leave_one_out_factor_is_caught(sets, monkeypatch):
    monkeypatch.setattr(rollouts, "leave_one_out", lambda returns: returns - returns.mean(0))
    assert sets.relative_bias(sets.mean_estimate("rtg")) > 0.1


def test_a_samples_own_gradient_in_the_control_variate_is_caught(sets, monkeypatch):
    own = control_variate.prediction

    def swapped(r, beta):  # with M = 2, exchanging the gradients gives each sample its own
        return own(Rollouts(r.logits, r.chosen, r.losses, r.local, r.mask, r.selection_gradients.flip(0)), beta)

    monkeypatch.setattr(control_variate, "prediction", swapped)
    assert sets.relative_bias(sets.mean_estimate("control_variate", beta=1.0)) > 1e-3


def test_the_command_reports_and_fails_when_a_claim_is_wrong(monkeypatch, capsys):
    from remix_cli.verify import exact, variance

    small = [exact.Bias("rtg", "rtg", True, 1e-15, 4)]
    ratios = [variance.VarianceRatio("rtg", 2, 0.08, 0.07, 0.09)]
    monkeypatch.setattr(variance, "variance_ratios", lambda: ratios)
    monkeypatch.setattr(sys, "argv", ["remix", "verify-estimator", "--json"])
    for found, code in ((small, 0), ([exact.Bias("rtg", "rtg", True, 1e-3, 4)], 1)):
        monkeypatch.setattr(exact, "exact_biases", lambda found=found, **_: found)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
        assert json.loads(capsys.readouterr().out)["sound"] == (code == 0)


@pytest.mark.slow
def test_variance_falls_from_paper_to_rtg_to_control_variate():
    """Bars: rtg at most 0.10 of paper at four sequences; with small LoRAs the control variate at most 0.02."""
    found = {(r.arm, r.selections): r for r in variance_ratios(strength=0.1, passes=256)}
    for m in (2, 4):
        assert found["paper", m].ratio == 1
        assert found["rtg", m].ratio < 0.10
        assert found["control_variate", m].ratio < 0.02
        assert found["control_variate, one backward", m].ratio < found["rtg", m].ratio


def test_leave_one_out_by_hand():
    returns = torch.tensor([[1.0], [4.0]])
    assert leave_one_out(returns).flatten().tolist() == [-3.0, 3.0]
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0])).tolist() == [-3.0, -1.5, 4.5]
    assert leave_one_out(torch.full((4, 3), 2.5)).abs().max() == 0
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.zeros(1, 3))


def test_reward_to_go_by_hand():
    assert reward_to_go(torch.tensor([1.0, 2.0, 4.0])).tolist() == [7.0, 6.0, 4.0]


def test_padding_decisions_have_no_gradient(sets):
    r = sets.all[torch.tensor([0, 5])]
    logits = r.logits.clone().requires_grad_()
    left = Rollouts(logits, r.chosen, r.losses, sets.bed.local, sets.bed.batch.mask, r.h)
    for estimator in ("paper", "rtg", "control_variate"):
        surrogate = make_estimator(estimator).estimate(left, {"beta": 0.5}).surrogate
        (slopes,) = torch.autograd.grad(surrogate, logits)
        assert slopes[..., ~sets.bed.batch.mask[0], :].abs().max() == 0
        assert slopes[..., sets.bed.batch.mask[0], :].abs().max() > 0


def test_beyond_the_subset_recursion_the_order_is_scored():
    logits, chosen = torch.randn(2, 12), torch.arange(9).expand(2, 9)
    assert close(rollouts.set_score(logits, chosen), paper.routing.ordered_log_prob(logits, chosen), 1e-6)


def test_the_coefficient_learns_from_earlier_steps_only():
    c = ControlVariate()
    assert c.numbers() == {"beta": 0}
    c.update([2.0, 4.0])
    assert c.numbers() == {"beta": 0.5}
    again = ControlVariate()
    again.load_state_dict(c.state_dict())
    for each in (c, again):
        each.update([400.0, 4.0])
        assert each.numbers() == {"beta": 1.0}
    again.load_state_dict({})
    assert again.numbers() == {"beta": 0}
