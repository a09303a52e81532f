"""The learning rate over the steps."""

import pytest
import torch
from helpers.tiny import recipe_text, write_recipe
from transformers import get_scheduler

from remix_cli.recipe import load_recipe
from remix_cli.train.optim import make_schedule

STEPS = 40


def schedule_of(tmp_path, steps, **train):
    recipe = recipe_text("models/x", tmp_path / "rows.jsonl", tmp_path / "run")
    recipe["train"] |= train
    return make_schedule(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)), steps)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_the_curves_are_those_of_transformers_after_the_warm_up(kind, tmp_path):
    warm = {} if kind == "constant" else {"warmup_ratio": 0.1}
    ours = schedule_of(tmp_path, STEPS, lr_scheduler_type=kind, **warm)
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(kind, stand_in, 4, STEPS).lr_lambdas[0]
    assert [ours(step) for step in range(4, STEPS)] == pytest.approx([theirs(step) for step in range(4, STEPS)])
    rising = [ours(step) for step in range(4)]
    expected = [1.0] * 4 if kind == "constant" else [0.25, 0.5, 0.75, 1.0]
    assert rising == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_step_of_a_short_run_trains_something(kind, steps, tmp_path):
    ours = schedule_of(tmp_path, steps, lr_scheduler_type=kind)
    assert all(ours(step) > 0 for step in range(steps))
