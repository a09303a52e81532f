"""Early stopping, exact under resume; and runs that are made longer."""

import json
import signal

import pytest
from helpers.runs import CLOCK, run
from helpers.tiny import recipe_text, write_recipe, write_rows, write_tiny_model
from rich.console import Console

from remix_cli.errors import Interrupted, RecipeError
from remix_cli.folders import check_run
from remix_cli.recipe import load_recipe
from remix_cli.train import checkpoints, stopping, trainer
from remix_cli.train.checkpoints import TrainingState


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    return write_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl", 24)


def recipe_of(stage, folder, **train):
    folder.mkdir(exist_ok=True)
    values = recipe_text(*stage, folder / "out", train={"eval_steps": 1, "save_steps": 3} | train)
    return load_recipe(write_recipe(folder / "recipe.yaml", values))


def outcome(folder):
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = checkpoints.list_checkpoints(folder / "checkpoints")
    return {
        "metrics": [{k: v for k, v in m.items() if k not in CLOCK} for m in metrics],
        "adapter": (folder / "adapter" / "adapter.safetensors").read_bytes(),
        "best": (folder / "best" / "adapter.safetensors").read_bytes(),
        "last": kept[-1].name,
        "optimizer": (kept[-1] / "optimizer.safetensors").read_bytes(),
    }


@pytest.mark.parametrize(
    ("values", "threshold", "patience", "stops"),
    [
        ([5.0, 4.0, 4.5, 4.2, 3.0], 0.0, 2, 3),  # two in a row that are no better than 4
        ([5.0, 4.0, 4.5, 3.9, 4.0], 0.0, 2, None),  # one of them is
        ([5.0, 4.0, 3.9, 3.8], 0.15, 2, 3),  # better, but not by more than that
        ([5.0, 5.5], 0.0, 1, 1),  # worse than the base model
        ([5.0, 5.0], 0.0, 1, 1),  # no better
    ],
)
def test_when_a_run_has_waited_enough(stage, tmp_path, values, threshold, patience, stops):
    recipe = recipe_of(stage, tmp_path, early_stopping_patience=patience, early_stopping_threshold=threshold)
    state, found = TrainingState(), None
    for step, value in enumerate(values):
        state.step = step
        stopping.count_measurement(recipe, state, {"eval_loss": value})
        if found is None and stopping.has_waited_enough(recipe, state):
            found = step
    assert found == stops


def test_a_measurement_beside_the_plan_does_not_count(stage, tmp_path):
    recipe = recipe_of(stage, tmp_path, early_stopping_patience=1, eval_steps=2)
    state = TrainingState()
    for step, value in ((0, 5.0), (2, 4.0), (3, 4.5)):
        state.step = step
        stopping.count_measurement(recipe, state, {"eval_loss": value})
    assert not stopping.has_waited_enough(recipe, state)


def test_more_is_better_for_some_metrics(stage, tmp_path):
    values = recipe_text(*stage, tmp_path / "out", train={"eval_tasks_limit": 3, "early_stopping_patience": 1})
    values["train"]["metric_for_best_model"] = "gsm8k/flexible"
    values["eval"] = {"tasks": [{"task": "gsm8k", "max_new_tokens": 2}]}
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values))
    state = TrainingState()
    for step, value in ((0, 0.1), (2, 0.3)):
        state.step = step
        stopping.count_measurement(recipe, state, {"eval_loss": 1.0, "gsm8k/flexible": value})
        assert not stopping.has_waited_enough(recipe, state)
    state.step = 4
    stopping.count_measurement(recipe, state, {"eval_loss": 0.5, "gsm8k/flexible": 0.2})
    assert stopping.has_waited_enough(recipe, state)


STOPPING = {"max_steps": 20, "early_stopping_patience": 2, "learning_rate": 0.3}  # a rate at which it soon gets worse


def stop_after(patch, step):
    original = trainer.Trainer._step

    def stopping_step(self, index):
        if index + 1 == step:
            self.signals.received = signal.SIGTERM
        return original(self, index)

    patch.setattr(trainer.Trainer, "_step", stopping_step)


@pytest.fixture(scope="module")
def stopped(stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    console = Console(width=300, record=True, quiet=False, file=(folder / "log").open("w"))
    summary = trainer.train(recipe_of(stage, folder, **STOPPING), console)
    return summary, outcome(folder / "out"), console.export_text()


def test_a_run_stops_early_with_its_best_adapter_and_says_so(stage, stopped):
    summary, found, printed = stopped
    assert summary["stopped_early"]
    assert summary["steps"] == summary["best_step"] + 2 < 20
    assert found["last"] == f"step-{summary['steps']:06d}"
    line = next(line for line in printed.splitlines() if line.startswith("stopped early"))
    assert f"after step {summary['steps']}: 2 measurements in a row of eval_loss did not better it" in line
    assert f"at step {summary['best_step']}, and is in" in line


def test_K3_a_run_that_stops_early_does_so_after_any_interruption(stage, stopped, monkeypatch, tmp_path):
    summary, found, _ = stopped
    for stop in (summary["steps"] - 1, summary["steps"]):
        recipe = recipe_of(stage, tmp_path / str(stop), **STOPPING)
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(Interrupted):
                run(recipe)
        again = run(recipe, resume=True)
        assert again["stopped_early"]
        assert outcome(tmp_path / str(stop) / "out") == found
    assert run(recipe, resume=True) == again
    longer = recipe_of(stage, tmp_path / str(stop), **(STOPPING | {"lr_scheduler_type": "constant"}))
    with pytest.raises(RecipeError, match=r"lr_scheduler_type: 'constant', but"):
        run(longer, resume=True)


def test_patience_needs_measurements(stage, tmp_path):
    with pytest.raises(
        RecipeError, match=r"early_stopping_patience: counts measurements, and without train.eval_steps"
    ):
        recipe_of(stage, tmp_path, early_stopping_patience=2, eval_steps=None)


@pytest.mark.parametrize("halfway", [False, True], ids=["finished", "killed after it was made longer"])
def test_a_run_of_constant_rates_goes_on_beyond_its_end(stage, monkeypatch, tmp_path, halfway):
    """To the same bits as one that was begun with all the steps."""
    constant = {"lr_scheduler_type": "constant", "eval_steps": 2, "save_steps": 2}
    run(recipe_of(stage, tmp_path / "whole", max_steps=4, **constant))
    run(recipe_of(stage, tmp_path / "part", max_steps=2, **constant))
    longer = recipe_of(stage, tmp_path / "part", max_steps=4, **constant)
    if halfway:
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            with pytest.raises(Interrupted):
                run(longer, resume=True)
    assert run(longer, resume=True)["steps"] == 4
    assert outcome(tmp_path / "part" / "out") == outcome(tmp_path / "whole" / "out")
    for best in (False, True):
        check_run(tmp_path / "part" / "out", best=best)
    run(longer, resume=True)
    with pytest.raises(RecipeError, match=r"train.max_steps: 3 steps, but .* has done 4 already"):
        run(recipe_of(stage, tmp_path / "part", max_steps=3, **constant), resume=True)
    assert json.loads((tmp_path / "part" / "out" / "summary.json").read_text())["steps"] == 4
    twice = recipe_of(stage, tmp_path / "part", max_steps=None, num_train_epochs=1.0, **constant)
    assert run(twice, resume=True)["steps"] == 5


def test_where_the_schedule_depends_on_the_end_a_line_says_what_to_use(stage, tmp_path):
    run(recipe_of(stage, tmp_path, max_steps=2))
    with pytest.raises(RecipeError) as caught:
        run(recipe_of(stage, tmp_path, max_steps=8), resume=True)
    (line,) = caught.value.problems
    assert line.startswith("train.max_steps: 8, but ")
    assert line.endswith(
        f"its cosine schedule is laid out over all steps; train on from its end, in a new output_dir, "
        f"with adapter.init_from: {tmp_path / 'out'}"
    )
    warm = {"lr_scheduler_type": "constant_with_warmup"}
    run(recipe_of(stage, tmp_path, max_steps=2, **warm), overwrite=True)
    with pytest.raises(RecipeError, match="constant_with_warmup schedule is laid out"):
        run(recipe_of(stage, tmp_path, max_steps=8, **warm), resume=True)
    run(recipe_of(stage, tmp_path, max_steps=2, warmup_ratio=0.0, **warm), overwrite=True)
    assert run(recipe_of(stage, tmp_path, max_steps=3, warmup_ratio=0.0, **warm), resume=True)["steps"] == 3
