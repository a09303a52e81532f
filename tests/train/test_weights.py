"""Weights of rows: what a step learns from them, and what they leave alone."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import steps
from helpers.common import close
from helpers.runs import outcome, run
from helpers.tiny import recipe_text, write_recipe, write_rows

from remix_cli.core.estimators.registry import make_estimator
from remix_cli.data.batches import collate
from remix_cli.recipe import load_recipe
from remix_cli.recipe.schema import Router
from remix_cli.train.micro_batch import accumulate_batch

SAMPLED = Router(estimator="control_variate", selections=2)
FIXED = Router(fixed=True)


def gradients(router, weights, *, cuts=(4,), of=(0, 1, 2, 3), few_shapes=False, adapter_config=None):
    """Of one step over the rows `of`, cut into micro-batches; and its loss, and the sum of its targets' weights."""
    model, adapter = steps.build(**(adapter_config or {}))
    all_rows = steps.rows()
    rows = [replace(all_rows[i], weight=weight) for i, weight in zip(of, weights, strict=True)]
    targets = sum(float(row.supervised[1:].sum()) * row.weight for row in rows)
    loss, start = 0.0, 0
    for size in cuts:
        batch = collate(rows[start : start + size], start, weighted=True)
        result = accumulate_batch(
            model,
            adapter,
            batch.in_few_shapes() if few_shapes else batch,
            router,
            make_estimator(router.estimator),
            targets_in_step=targets,
            seed=(0, 7),
            numbers={"beta": 0.5},
            backward=lambda loss: loss.backward(),
        )
        loss += float(result.loss)
        start += size
    found = {name: p.grad for name, p in adapter.parameters().items() if p.grad is not None}
    return found, loss, targets


def test_a_weight_of_two_is_the_row_twice():
    once, loss, _ = gradients(FIXED, [2, 1, 1, 0.5], of=(0, 1, 2, 3))
    twice, same_loss, _ = gradients(FIXED, [1, 1, 1, 1, 0.5], of=(0, 0, 1, 2, 3), cuts=(5,))
    assert steps.same(once, twice)
    assert loss == pytest.approx(same_loss, rel=1e-5)


@pytest.mark.parametrize("router", [SAMPLED, FIXED])
def test_weights_that_are_all_alike_change_nothing(router):
    plain, loss, _ = gradients(router, [1, 1, 1, 1])
    for weight in (0.25, 3):
        weighted, same_loss, _ = gradients(router, [weight] * 4)
        assert steps.same(weighted, plain)
        assert same_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_loras_and_routers_learn_from_the_weighted_losses(level):
    """A step's gradient is the sum of its rows' own, each times its weight: so are the routers' rewards."""
    weights = [2, 0.5, 1, 3]
    found, _, targets = gradients(SAMPLED, weights, adapter_config={"level": level})
    summed = {name: torch.zeros_like(gradient) for name, gradient in found.items()}
    for i, weight in enumerate(weights):
        own, _, of_row = gradients(SAMPLED, [float(i == j) for j in range(4)], adapter_config={"level": level})
        for name, gradient in own.items():
            summed[name] += weight * of_row * gradient / targets
    assert any("router" in name for name in found)
    assert all(close(found[name], summed[name], 1e-4) for name in found)


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("cuts", [(4,), (2, 2), (1, 3)])
def test_micro_batches_and_shapes_of_recorded_steps_leave_a_weighted_step_as_it_is(cuts, few_shapes):
    weights = [2, 0.5, 1, 3]
    whole, loss, _ = gradients(SAMPLED, weights)
    cut, same_loss, _ = gradients(SAMPLED, weights, cuts=cuts, few_shapes=few_shapes)
    assert steps.same(cut, whole)
    assert same_loss == pytest.approx(loss, rel=1e-5)


def test_the_balance_loss_of_a_weighted_step_counts_once():
    router = Router(balance=0.5)
    config = {"method": "mixlora", "active": 2}
    whole, _, _ = gradients(router, [2, 0.5, 1, 3], adapter_config=config)
    alike, _, _ = gradients(router, [1, 0.25, 0.5, 1.5], adapter_config=config)
    assert steps.same(alike, whole)


def weighted_rows(stage, tmp_path, weights):
    """The stage's rows with weights, and as many others held out."""
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in stage[1].read_text().splitlines()]
    given = [row | ({} if weight is None else {"weight": weight}) for row, weight in zip(rows, weights, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def trained(stage, tmp_path, name, path):
    held = write_rows(tmp_path / f"{name}-held.jsonl", 10, seed=3)
    data = {
        "train": [{"path": str(path), "format": "gsm8k"}],
        "validation": [{"path": str(held), "format": "gsm8k"}],
        "allow_overlap": True,
    }
    recipe = recipe_text(stage[0], path, tmp_path / name, train={"max_steps": 6})
    recipe["data"] = {"max_length": 32} | data
    run(load_recipe(write_recipe(tmp_path / f"{name}.yaml", recipe)))
    return outcome(tmp_path / name)


def test_rows_of_weight_0_are_as_if_they_were_not_there(stage, tmp_path):
    weights = [0 if i % 4 == 1 else 1 for i in range(40)]
    with_zeros = weighted_rows(stage, tmp_path, weights)
    ends = [trained(stage, tmp_path, "with", with_zeros)]
    lines = with_zeros.read_text().splitlines(keepends=True)
    with_zeros.write_text("".join(line for line in lines if '"weight": 0' not in line))
    ends.append(trained(stage, tmp_path, "without", with_zeros))
    assert ends[0] == ends[1]


def test_a_weight_of_1_is_none_and_another_is_learnt_from(stage, tmp_path):
    none = trained(stage, tmp_path, "none", weighted_rows(stage, tmp_path, [None] * 40))
    ones = trained(stage, tmp_path, "ones", weighted_rows(stage, tmp_path, [1] * 40))
    assert ones == none
    others = trained(stage, tmp_path, "others", weighted_rows(stage, tmp_path, [1, 0.1] * 20))
    assert others["adapter"] != none["adapter"]
    assert others["metrics"][0]["eval_loss"] == none["metrics"][0]["eval_loss"]


def test_validate_counts_rows_of_weight_0_and_refuses_where_all_are(stage, tmp_path, verb):
    path = weighted_rows(stage, tmp_path, [0, 1] * 20)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(stage[0], path, tmp_path / "out"))
    (source,) = json.loads(verb("validate", recipe, "--json")[0])["sources"]
    assert source["left_out"] > 10
    assert source["rows"] + source["left_out"] == 32
    out, _ = verb("validate", recipe)
    assert f"{source['left_out']} left out (weight 0)" in out
    weighted_rows(stage, tmp_path, [0] * 40)
    _, err = verb("validate", recipe, expect=2)
    assert "rows.jsonl: every row has weight 0, so there is nothing to learn" in err


def test_held_out_rows_of_weight_0_are_left_out_and_others_count_alike(stage, tmp_path):
    from remix_cli.data.splits import load_data
    from remix_cli.models import load_tokenizer

    path = weighted_rows(stage, tmp_path, [0, 3] * 20)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", recipe_text(stage[0], path, tmp_path / "out")))
    data = load_data(recipe, load_tokenizer(recipe.model))
    assert 0 < len(data.validation.rows) < 8
    assert collate(list(data.validation.rows)).weights is None
