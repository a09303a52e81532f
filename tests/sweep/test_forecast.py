"""How long a sweep still takes, for runs of unlike cost, several processes, runs in hand and scoring."""

import json

import pytest
from helpers.tiny import recipe_text, write_recipe

from remix_cli.errors import DataError
from remix_cli.recipe.sweep_grammar import load_sweep
from remix_cli.sweep.forecast import Awaited, Forecast, in_words, last_logged
from remix_cli.sweep.size import run_sizes
from remix_cli.train.run_size import RunSize


def size(work, steps=10):
    return RunSize(steps, 4, 100, 30, work)


def test_a_run_costs_what_others_of_its_arm_took_or_else_its_work_says():
    forecast = Forecast(1)
    forecast.awaited = {"a": Awaited("LoRA", size(3.0)), "b": Awaited("ReMix", size(8.0))}
    assert forecast.seconds_left() is None
    forecast.ran("LoRA", size(3.0), 30.0)
    assert forecast.seconds_left() == pytest.approx(30 + 80)
    forecast.ran("ReMix", size(8.0), 40.0)
    assert forecast.seconds_left() == pytest.approx(30 + 40)
    forecast.scorings.update(LoRA=2, ReMix=1)
    assert forecast.seconds_left() == pytest.approx(30 + 40)
    forecast.scored("LoRA", 5.0)
    assert forecast.seconds_left() == pytest.approx(30 + 40 + 15)


def test_the_latest_run_says_how_fast_the_machine_is_and_what_was_before_only_until_then(tmp_path):
    """A sweep that began on a busy machine was told hours that it took minutes for, to its end."""
    forecast = Forecast(1)
    forecast.awaited = {"a": Awaited("A", size(2.0), tmp_path), "b": Awaited("B", size(1.0))}
    for seconds in (100.0, 300.0):
        forecast.had_run("A", size(1.0), seconds)
    assert not forecast.has_measured
    assert forecast.seconds_left() == pytest.approx(3 * 200)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 0.5}\n')
    assert forecast.has_measured
    assert forecast.seconds_left() == pytest.approx(0.9 * 5 + 2.5)  # of ten steps one is done
    del forecast.awaited["a"]
    forecast.ran("A", size(1.0), 40.0)
    forecast.ran("A", size(1.0), 4.0)
    assert forecast.seconds_left() == pytest.approx(4)


def test_several_processes_share_the_work_but_no_run_is_split():
    forecast = Forecast(4)
    forecast.ran("A", size(1.0), 10.0)
    forecast.awaited = {number: Awaited("A", size(1.0)) for number in range(8)}
    assert forecast.seconds_left() == pytest.approx(20)
    forecast.awaited = {0: Awaited("A", size(1.0)), 1: Awaited("A", size(3.0))}
    assert forecast.seconds_left() == pytest.approx(30)


def test_runs_in_hand_say_how_far_they_are_and_the_first_how_fast(tmp_path):
    lines = [{"step": 0, "eval_loss": 2.0}, {"step": 4, "step_seconds": 0.5}, {"step": 4, "eval_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    forecast = Forecast(1)
    forecast.awaited = {"now": Awaited("A", size(2.0), tmp_path), "later": Awaited("B", size(6.0))}
    assert forecast.seconds_left() == pytest.approx(0.6 * 5 + 15)
    forecast.ran("A", size(2.0), 7.0)  # a whole run knows more than steps do
    assert forecast.seconds_left() == pytest.approx(0.6 * 7 + 21)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "step_se')
    assert last_logged(tmp_path) is None
    assert last_logged(tmp_path / "nothing") is None


def test_what_trains_nothing_takes_no_time():
    forecast = Forecast(1)
    forecast.ran("none", size(0.0, steps=0), 3.0)
    forecast.awaited = {"a": Awaited("none", size(0.0, steps=0))}
    assert forecast.seconds_left() == 0
    forecast.awaited["b"] = Awaited("A", size(1.0))
    assert forecast.seconds_left() is None


@pytest.mark.parametrize(("seconds", "said"), [(4.4, "4 s"), (89, "89 s"), (840, "14 min"), (8400, "2.3 h")])
def test_durations_are_said_roughly(seconds, said):
    assert in_words(seconds) == said


def test_the_size_of_a_run_is_what_it_trains_on(stage, tmp_path):
    model, rows, _ = stage
    path = write_recipe(tmp_path / "recipe.yaml", recipe_text(model, rows, tmp_path / "run"))
    points = load_sweep(path).points
    sizes = run_sizes([some[0] for some in points.values()])
    one = {name: sizes[some[0].folder] for name, some in points.items()}
    assert {found.steps for found in one.values()} == {4}
    assert {found.tokens for found in one.values()} == {176}  # 16 rows of 11 tokens
    assert one["ReMix"].work == 2 * one["fixed"].work == 2 * one["rsLoRA-r6"].work


def test_too_few_rows_for_the_clusters_are_told_before_anything_is_trained(stage, tmp_path, verb):
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "run")
    recipe["data"]["train"][0]["limit"] = 20
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    with pytest.raises(DataError, match=r"^sweep.arms.clusters: router.clusters: 32 clusters need"):
        run_sizes([some[0] for some in load_sweep(path).points.values()])
    _, err = verb("sweep", path, expect=2)
    assert "or leave the arm out: --only '(?!clusters$).*'" in err
    assert list(load_sweep(path, only="(?!clusters$).*").points) == ["rsLoRA-r6", "rsLoRA-r12", "fixed", "ReMix"]
