"""What routing is worth on given rows: route-stats --headroom."""

import json

import pytest
import torch
from helpers.tiny import fill_adapter, recipe_text, write_recipe

from remix_cli.data.splits import held_out_examples
from remix_cli.evaluation.headroom import DRAWS, PASSES, Headroom, headroom
from remix_cli.evaluation.nll import mean_loss, row_losses
from remix_cli.runs import load_run

BEST = f"best of {DRAWS} draws, all blocks"


@pytest.fixture
def run(finished):
    loaded = load_run(finished)
    fill_adapter(loaded.adapter)  # LoRAs that differ, and routers that choose by the token
    return loaded


@pytest.fixture
def rows(run):
    return run.encoder.encode_rows(held_out_examples(run.recipe)).rows


def measure(run, rows, size=16):
    """The choices by name."""
    done = []
    found = headroom(run, rows, size, done.append)
    assert sum(done) == PASSES * len(rows)
    return {choice.name: choice for choice in found.choices}


def test_the_top_k_has_the_held_out_loss_and_oracles_are_never_worse(run, rows):
    found = measure(run, rows)
    expected = mean_loss(row_losses(run.model, run.adapter, rows, 4))
    assert found["the top k"].loss.value == pytest.approx(expected, rel=1e-5)
    assert found["the top k"].difference is None
    for name in (BEST, f"best of {DRAWS} draws, one block"):
        assert found[name].difference.value <= 0
    assert found["one set for all tokens"].difference.value != 0
    assert found["another token's set"].difference.value != 0


def test_it_does_not_depend_on_how_many_rows_are_looked_at_at_once(run, rows):
    """But for the shuffled sets, which are drawn anew."""
    one, two = measure(run, rows, 16), measure(run, rows, 3)
    for name in set(one) - {"another token's set"}:
        assert one[name].loss.value == pytest.approx(two[name].loss.value, rel=1e-5), name


def test_loras_that_are_all_alike_leave_nothing_to_choose(run, rows):
    n = run.adapter.config.pool_size
    with torch.no_grad():
        for linear in run.adapter.linears.values():
            a, b = linear.lora_A, linear.lora_B
            a.copy_(a[: linear.rank].repeat(n, 1))
            b.copy_(b[:, : linear.rank].repeat(1, n))
    found = measure(run, rows)
    for name, choice in found.items():
        if choice.difference is not None:
            assert choice.difference.value == pytest.approx(0, abs=1e-5), name


def test_a_router_that_always_takes_one_set_loses_nothing_by_shuffling(run, rows):
    with torch.no_grad():
        for router in run.adapter.routers.values():
            router.weight.zero_()  # ties go to the same LoRAs for every token
    found = measure(run, rows)
    assert found["another token's set"].difference.value == pytest.approx(0, abs=1e-6)
    assert "makes no clear difference" in Headroom(len(rows), list(found.values())).verdict


def test_the_verb_writes_a_report_and_refuses_what_has_no_choice(verb, finished, stage, tmp_path):
    out, _ = verb("route-stats", finished, "--headroom", "--limit", 6)
    assert "another token's set" in out
    assert max(map(len, out.splitlines()[:9])) <= 80
    written = json.loads((finished / "stats" / "headroom-adapter.json").read_text())
    assert written["rows"] == 6
    assert json.loads(verb("route-stats", finished, "--headroom", "--limit", 6, "--json")[0]) == written
    assert "cannot be combined" in verb("route-stats", finished, "--headroom", "--history", expect=2)[1]
    recipe = recipe_text(stage[0], stage[1], tmp_path / "plain") | {"adapter": {"method": "rslora", "rank": 2}}
    recipe["router"] = {}
    verb("train", write_recipe(tmp_path / "r.yaml", recipe), "train.max_steps=1")
    assert "no choice to compare with" in verb("route-stats", tmp_path / "plain", "--headroom", expect=2)[1]


def test_what_is_written_is_read_back(run, rows):
    found = headroom(run, rows[:3], 4, lambda _: None)
    assert Headroom.from_dict(json.loads(json.dumps(found.to_dict()))) == found
