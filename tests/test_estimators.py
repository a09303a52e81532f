"""The router's gradient against exact enumeration of every selection (float64)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tiny import fill_adapter, tiny_model
from torch import Tensor

from remix_cli import objective
from remix_cli.adapter import routing
from remix_cli.adapter.config import AdapterConfig
from remix_cli.adapter.patch import apply_adapter
from remix_cli.adapter.trace import Trace
from remix_cli.data.batches import collate
from remix_cli.data.encode import EncodedRow
from remix_cli.models import batch_losses
from remix_cli.objective import Coefficient, Rollouts, leave_one_out, reward_to_go, router_surrogate

SEQUENCES, POSITIONS = 1, 2


class Enumeration:
    """A two-layer decoder with attention, one router a layer, T = 2 positions, and one padding position.

    Every joint selection (2 routers x 2 positions) is enumerated: its probability, losses, and score are
    computed by the same library code that training uses, driven by prescribed selections.
    """

    def __init__(self, k: int, strength: float = 0.7):
        n = 4
        self.k = k
        self.model = tiny_model(dtype=torch.float64, hidden_size=8, intermediate_size=8, vocab_size=12)
        config = AdapterConfig(pool_size=n, active=k, rank=1)
        self.adapter = apply_adapter(self.model, config, seed=0)
        for linear in self.adapter.linears.values():
            linear.double()
        for router in self.adapter.routers.values():
            router.double()
        fill_adapter(self.adapter, strength)
        self.routers = list(self.adapter.routers.values())
        row = EncodedRow(torch.tensor([3, 7, 5]).numpy(), torch.tensor([False, True, True]).numpy(), "t")
        batch = collate([row])
        # Positions 0 and 1 hold targets, position 2 the last token; 3 .. 7 are padding.
        self.batch = replace(batch, input_ids=batch.input_ids[:, :4], mask=batch.mask[:, :4])
        self.batch.mask[0, 2] = False  # its decisions reach no loss; masking them keeps the enumeration small
        sets = list(itertools.combinations(range(n), k))
        self.trajectories = list(itertools.product(sets, repeat=len(self.routers) * POSITIONS))

    def prescribe(self, trajectory: tuple) -> Tensor:
        """Noise that makes the routers choose exactly `trajectory`, (L, 1, 4, n)."""
        noise = torch.zeros(len(self.routers), 1, 4, 4, dtype=torch.float64)
        for index, chosen in enumerate(trajectory):
            layer, t = divmod(index, POSITIONS)
            noise[layer, 0, t, list(chosen)] = 1e6
        return noise

    def run(self, trajectory: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(losses (B, T), logits (L, B, T, n) with graph to P, chosen (L, B, T, k), h = dL/dz (L, B, T, n))."""
        trace = Trace(noise=self.prescribe(trajectory), selection_grad=True)
        with self.adapter.tracing(trace):
            losses = batch_losses(self.model, self.batch) / len(self.batch.targets)
        losses.sum().backward()
        decisions = [trace.decisions[r.name] for r in self.routers]
        logits = torch.stack([r.logits(d.inputs) for r, d in zip(self.routers, decisions, strict=True)])
        h = torch.stack([d.weights.grad for d in decisions]) * self.adapter.config.scale
        return losses.detach().double(), logits, torch.stack([d.chosen for d in decisions]), h

    def parameters(self) -> list[Tensor]:
        return [r.weight for r in self.routers]


@pytest.fixture(scope="module", params=[2, 3], ids=["k=2", "k=3"])
def bed(request):
    """The testbed with every trajectory's losses, logits, selections and probability, and the true gradient."""
    torch.manual_seed(0)
    bed = Enumeration(request.param)
    runs = [bed.run(t) for t in bed.trajectories]
    bed.losses = torch.stack([r[0] for r in runs])  # (J, 1, 4)
    bed.logits = torch.stack([r[1] for r in runs])  # (J, L, 1, 4, n)
    bed.chosen = torch.stack([r[2] for r in runs])
    bed.h = torch.stack([r[3] for r in runs])
    bed.local = torch.tensor([r.local for r in bed.routers])
    bed.log_q = (routing.set_log_prob(bed.logits, bed.chosen) * bed.batch.mask).sum((1, 2, 3))  # (J,)
    assert abs(bed.log_q.exp().sum().item() - 1) < 1e-12
    expected_loss = (bed.log_q.exp() * bed.losses.sum((1, 2))).sum()
    bed.truth = flat(torch.autograd.grad(expected_loss, bed.parameters(), retain_graph=True))
    bed.probability = bed.log_q.exp().detach()
    return bed


def flat(tensors) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def expected_estimate(bed: Enumeration, weights_of) -> Tensor:
    """E over independent pairs (M = 2) of the estimator 1/2 sum_m A_m score_m, by conditioning on one sample.

    Given sample m = j, the baseline is the mean over the other sample: so E[A_j] uses E[R]. `weights_of`
    gives A (J, L, 1, T) for sample j with the other sample's return replaced by its expectation, which is
    exact because every estimator here is linear in the other sample's return.
    """
    advantages = weights_of(bed)
    scored = (advantages.detach() * score(bed, bed.log_score) * bed.batch.mask).sum((1, 2, 3))
    return flat(torch.autograd.grad((bed.probability * scored).sum(), bed.parameters(), retain_graph=True))


def score(bed: Enumeration, kind: str) -> Tensor:
    return objective.score(kind, bed.logits, bed.chosen)


def mean_over_other(bed: Enumeration, values: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (values.dim() - 1)
    return (bed.probability.view(shape) * values).sum(0, keepdim=True)


@pytest.mark.parametrize("name", ["paper", "rtg"])
def test_mean_over_all_selections_is_the_gradient_of_the_expected_loss(bed, name):
    bed.log_score = name

    def advantages(bed):
        returns = objective.credit(name, bed.losses, bed.local).expand(len(bed.losses), 2, 1, 4)
        return returns - mean_over_other(bed, returns)

    if name == "paper":  # the ordered score, averaged over the orders in which a set may be drawn
        estimate = _paper_over_orders(bed, advantages(bed))
    else:
        estimate = expected_estimate(bed, advantages)
    assert relative(estimate, bed.truth) < 1e-10


def _paper_over_orders(bed: Enumeration, advantages: Tensor) -> Tensor:
    """sum over ordered draws of Q(order) * A * grad log Q(order), decision by decision."""
    total = torch.zeros((), dtype=torch.float64)
    set_log = routing.set_log_prob(bed.logits, bed.chosen)
    for permutation in itertools.permutations(range(bed.k)):
        order = bed.chosen[..., list(permutation)]
        log_order = objective.score("paper", bed.logits, order)
        share = (log_order - set_log).exp().detach()  # P(order | set)
        scored = (share * advantages.detach() * log_order * bed.batch.mask).sum((1, 2, 3))
        total = total + (bed.probability * scored).sum()
    return flat(torch.autograd.grad(total, bed.parameters(), retain_graph=True))


def relative(estimate: Tensor, truth: Tensor) -> float:
    return float((estimate - truth).norm() / truth.norm())


def test_a_label_shift_of_one_is_caught(bed):
    """Negative control: decisions at s credited with losses from s + 1 on."""
    bed.log_score = "rtg"

    def late(bed):
        shifted = torch.cat([bed.losses[..., 1:], torch.zeros_like(bed.losses[..., :1])], dim=-1)
        returns = objective.credit("rtg", shifted, bed.local).expand(len(bed.losses), 2, 1, 4)
        return returns - mean_over_other(bed, returns)

    assert relative(expected_estimate(bed, late), bed.truth) > 0.1


def test_calling_another_layer_local_is_caught(bed):
    """Negative control: local credit before the last attention loses what later positions see."""
    bed.log_score = "rtg"

    def wrong(bed):
        returns = objective.credit("rtg", bed.losses, torch.tensor([True, True])).expand(len(bed.losses), 2, 1, 4)
        return returns - mean_over_other(bed, returns)

    assert relative(expected_estimate(bed, wrong), bed.truth) > 1e-4


def pair_estimates(
    bed: Enumeration, name: str, *, m: int, one_backward: bool, beta: float, groups: int, seed: int
) -> Tensor:
    """`groups` independent estimates through the very function that training calls, (groups, parameters)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.multinomial(bed.probability.expand(groups, -1), m, replacement=True, generator=generator)
    estimates = []
    logits, directions = bed.logits.detach(), bed.directions
    for j in draws:
        leaf = logits[j].requires_grad_()
        rollouts = Rollouts(
            logits=leaf,
            chosen=shuffle_orders(bed.chosen[j], logits[j], generator) if name == "paper" else bed.chosen[j],
            losses=bed.losses[j],
            local=bed.local,
            mask=bed.batch.mask,
            selection_gradients=bed.h[j[:1] if one_backward else j],
        )
        surrogate, _ = router_surrogate(name, rollouts, beta)
        (slopes,) = torch.autograd.grad(surrogate, leaf)
        estimates.append(torch.einsum("mlbtn,mlbtd->lnd", slopes, directions[j]).flatten())
    return torch.stack(estimates)


def shuffle_orders(chosen: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """Redraw the order in which each given set came, from its conditional distribution."""
    orders = torch.stack([chosen[..., list(p)] for p in itertools.permutations(range(chosen.shape[-1]))])
    log_p = torch.stack([routing.ordered_log_prob(logits, o) for o in orders])  # (k!, ...)
    p = (log_p - log_p.logsumexp(0)).exp().movedim(0, -1)
    pick = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
    return orders.movedim(0, -2).gather(-2, pick[..., None, None].expand(*pick.shape, 1, chosen.shape[-1])).squeeze(-2)


@pytest.fixture(scope="module")
def directions(bed):
    """x / ||x|| of every decision, (J, L, 1, 4, D), by inverting nothing: the logits' Jacobian is x itself."""
    runs = []
    for t in bed.trajectories:
        trace = Trace(noise=bed.prescribe(t))
        with bed.adapter.tracing(trace), torch.no_grad():
            batch_losses(bed.model, bed.batch)
        runs.append(torch.stack([r.direction(trace.decisions[r.name].inputs) for r in bed.routers]))
    bed.directions = torch.stack(runs)
    return bed.directions


ARMS = {
    "paper": ("paper", 2, False, 0.0),
    "rtg": ("rtg", 2, False, 0.0),
    "control_variate": ("control_variate", 2, False, 1.0),
    "control_variate, M = 3, beta = 0.5": ("control_variate", 3, False, 0.5),
    "control_variate, one backward": ("control_variate", 3, True, 0.7),
}


@pytest.mark.parametrize("arm", ARMS)
def test_sampled_estimates_have_the_true_mean(bed, directions, arm):
    """The function that training calls, sampled: a chi-square-like distance within five standard errors."""
    name, m, one, beta = ARMS[arm]
    x = pair_estimates(bed, name, m=m, one_backward=one, beta=beta, groups=1500, seed=3)
    z = (x.mean(0) - bed.truth) / (x.std(0) / math.sqrt(len(x)) + 1e-12)
    assert z.abs().max() < 5, f"largest deviation {z.abs().max():.1f} standard errors"


def exact_pairs(bed: Enumeration, beta: float, own: bool = False) -> Tensor:
    """E over ALL ordered pairs of trajectories of the control-variate estimate, M = 2, in closed form.

    For sample j with partner p: (R_j - R_p - beta (C_jp - C_pp')) score_j + beta grad (h_p . pi_j), where C_jp
    uses h of p on j's surprise and C_pp' uses h of p on p's own. Each product splits into sums over p that
    are moments of (h, R), so the double sum needs no J x J table. `own` uses j's own h: a wrong variant.
    """
    z = routing.selection_mask(bed.chosen, 4).double()
    pi = routing.inclusion_probabilities(bed.logits, bed.k)
    mask = bed.batch.mask
    h = bed.h * mask[..., None]
    mean_h = mean_over_other(bed, h)
    surprise = z - pi.detach()
    effect = ((h if own else mean_h) * surprise).sum(-1).sum(1, keepdim=True)  # (J, 1, 1, T)
    partner = mean_over_other(bed, (h * surprise).sum(-1).sum(1, keepdim=True))
    rtg = lambda x: torch.where(bed.local[:, None, None], x, reward_to_go(x))  # noqa: E731
    returns = objective.credit("rtg", bed.losses, bed.local)
    advantages = returns - mean_over_other(bed, returns) - beta * (rtg(effect) - rtg(partner))
    scored = (advantages.detach() * objective.score("rtg", bed.logits, bed.chosen) * mask).sum((1, 2, 3))
    linear = beta * ((h if own else mean_h).detach() * pi).sum((1, 2, 3, 4))
    total = (bed.probability * (scored + linear)).sum()
    return flat(torch.autograd.grad(total, bed.parameters(), retain_graph=True))


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_control_variate_is_exactly_unbiased(bed, beta):
    assert relative(exact_pairs(bed, beta), bed.truth) < 1e-10


def test_a_samples_own_gradient_would_bias_the_control_variate(bed):
    assert relative(exact_pairs(bed, 1.0, own=True), bed.truth) > 1e-3


def test_variance_falls_from_paper_to_rtg(bed, directions):
    def spread(name, beta=0.0):
        return pair_estimates(bed, name, m=2, one_backward=False, beta=beta, groups=600, seed=5).var(0).sum()

    assert spread("rtg") < 0.8 * spread("paper")


def test_leave_one_out_by_hand():
    returns = torch.tensor([[1.0], [4.0]])
    assert leave_one_out(returns).flatten().tolist() == [-3.0, 3.0]
    three = leave_one_out(torch.tensor([1.0, 2.0, 6.0]))
    assert three.tolist() == [-3.0, -1.5, 4.5]
    assert leave_one_out(torch.full((4, 3), 2.5)).abs().max() == 0
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.zeros(1, 3))


def test_reward_to_go_by_hand():
    assert reward_to_go(torch.tensor([1.0, 2.0, 4.0])).tolist() == [7.0, 6.0, 4.0]


def test_the_coefficient_learns_from_earlier_steps_only():
    c = Coefficient()
    assert c.beta == 0
    c.update(torch.tensor([2.0, 4.0]))
    assert c.beta == 0.5
    c.update(torch.tensor([400.0, 4.0]))
    assert c.beta == 1.0
