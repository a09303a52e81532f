"""Routing statistics on hand-made decisions."""

import math

import pytest
import torch

from remix_cli.adapter.trace import Decision
from remix_cli.stats.routing import BlockCounter, mutual_information

N, K = 4, 2


def decision(logits, chosen):
    """(1, T, n) logits and (1, T, k) ids, with constant weights 0.5 on the chosen."""
    logits, chosen = torch.tensor(logits).float().unsqueeze(0), torch.tensor(chosen).unsqueeze(0)
    weights = torch.zeros_like(logits).scatter(-1, chosen, 0.5)
    return Decision(torch.zeros(1, logits.shape[1], 3), logits, torch.ones_like(logits[..., :1]), chosen, weights)


def count(*parts):
    """`parts`: (decision, mask, token ids, task ids), each one batch."""
    counter = BlockCounter("b", N, vocabulary=10, tasks=2)
    for d, mask, tokens, tasks in parts:
        as_row = lambda values, kind: torch.tensor([values], dtype=kind)  # noqa: E731
        counter.add(d, as_row(mask, torch.bool), as_row(tokens, torch.long), as_row(tasks, torch.long))
    return counter.result()


def test_uniform_router_by_hand():
    d = decision([[0.0] * N] * 2, [[0, 1], [2, 3]])
    r = count((d, [1, 1], [5, 6], [0, 0]))
    assert r.tokens == 2
    assert r.entropy == pytest.approx(math.log(4))
    assert r.entropy_share == pytest.approx(1)
    assert (r.ess_q, r.ess_q_worst, r.ess_weights) == pytest.approx((4, 4, 2))
    assert r.share == [0.5] * 4
    assert (r.distinct_sets, r.commonest_set, r.dead) == (2, 0.5, [])
    assert r.task_information == pytest.approx(0)
    assert r.token_information == pytest.approx(math.log(2))  # the token tells which pair, not which of the two


def test_collapsed_router_by_hand():
    d = decision([[90.0, 80.0, 0.0, 0.0]] * 3, [[0, 1], [1, 0], [0, 1]])
    r = count((d, [1, 1, 1], [1, 2, 3], [0, 1, 0]))
    assert r.entropy == pytest.approx(5e-4, abs=1e-4)
    assert r.ess_q == pytest.approx(1, abs=1e-3)
    assert r.share == [1, 1, 0, 0]
    assert r.dead == [2, 3]
    assert (r.distinct_sets, r.commonest_set) == (1, 1.0)  # the order of a set does not matter
    assert r.token_information == pytest.approx(0)


def test_task_determined_router_by_hand():
    d = decision([[0.0] * N] * 4, [[0, 1], [0, 1], [2, 3], [2, 3]])
    r = count((d, [1] * 4, [1, 1, 1, 1], [0, 0, 1, 1]))
    assert r.task_information == pytest.approx(math.log(2))
    assert r.token_information == pytest.approx(0)


def test_padding_and_batching_change_nothing():
    logits, chosen = torch.randn(6, N).tolist(), [[0, 1], [1, 2], [2, 3], [0, 3], [1, 3], [0, 2]]
    tokens, tasks = [1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 0, 1]
    whole = count((decision(logits, chosen), [1] * 6, tokens, tasks))
    junk = [[99.0, 0, 0, 0]]
    first = decision(logits[:4] + junk, [*chosen[:4], [0, 1]])
    second = decision(logits[4:], chosen[4:])
    split = count((first, [1] * 4 + [0], [*tokens[:4], 9], [*tasks[:4], 0]), (second, [1, 1], tokens[4:], tasks[4:]))
    assert split.share == whole.share
    assert split.entropy == pytest.approx(whole.entropy)
    assert split.ess_q == pytest.approx(whole.ess_q)
    assert split.tokens == whole.tokens == 6
    assert split.task_information == pytest.approx(whole.task_information)


def test_mutual_information_by_hand():
    assert mutual_information(torch.eye(2)) == pytest.approx(math.log(2))
    assert mutual_information(torch.ones(3, 5)) == pytest.approx(0)
