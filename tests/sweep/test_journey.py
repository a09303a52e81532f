"""From a plain recipe to a decision in one command, going on, and what lies in the folder afterwards."""

import json

import pytest
import yaml
from helpers.tiny import recipe_text, write_recipe
from helpers.workers import in_this_process

from remix_cli.recipe import load_recipe
from remix_cli.recipe.sweep_grammar import load_sweep
from remix_cli.sweep import forecast, runner, work


@pytest.fixture
def plain(stage, tmp_path):
    """Two arms: every LoRA of the pool is always active."""
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "run") | {"router": {}}
    recipe["adapter"] = {"pool_size": 2, "active": 2, "rank": 2}
    recipe["train"] = {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 0.02, "logging_steps": 1}
    return write_recipe(tmp_path / "recipe.yaml", recipe)


@pytest.mark.slow
def test_one_command_leads_from_a_recipe_to_a_decision(plain, tmp_path, verb, monkeypatch):
    ran = in_this_process(monkeypatch)
    out, _ = verb("sweep", plain, "--seeds", "2")
    folder = tmp_path / "run-sweep"
    lines = out.splitlines()
    assert lines[:2] == [
        "2 arms: rsLoRA-r4, pool",
        "6 runs to search, then 2 more: the best of each arm under seed 1",
    ]
    assert "each run: 2 steps of 8 rows, 176 tokens" in lines
    assert [line.split()[0] for line in lines[4:8]] == ["reading", "each", "warning:", "least,"]
    assert lines[8] == "loading the model; how long all takes is known after the first step"
    assert not [line for line in lines if len(line) > 80 and str(tmp_path) not in line]
    trained = [line for line in lines if "/8 trained  " in line]
    assert [line[:6] for line in trained] == [f"{number:>4}/8" for number in range(1, 9)]
    assert all(" s left" in said for said in " ".join(out.split()).split("/8 trained ")[1:-1])
    decided = " ".join(out.split())
    decided = decided[decided.index("is best by held-out loss, nats per token: ") :]
    assert (
        "this rests on 8 scored rows, 2 seeds, 176 tokens of training each; the same rows chose the settings" in decided
    )
    assert f"remix train {folder}/best.yaml" in decided
    # the recipe to take is a recipe, and the run that it stands for is there
    best = load_recipe(folder / "best.yaml")
    report = json.loads(verb("compare", folder, "--json")[0])
    taken = next(arm for arm in report["arms"] if arm["arm"] == report["decision"]["take"])
    assert f"learning_rate={best.train.learning_rate:g}" == taken["setting"]
    run = load_recipe(folder / taken["arm"] / f"{taken['setting']}-seed0" / "recipe.yaml", stored=True)
    assert run == best.model_copy(update={"output_dir": run.output_dir})
    # what was written out is the same sweep, in which everything is done
    again, _ = verb("sweep", folder / "sweep.yaml")
    assert (
        again[again.index("Arms at their best") : again.index("remix export")]
        == (out[out.index("Arms at their best") : out.index("remix export")])
    )
    # more seeds: of those that are there none is trained again
    ran.clear()
    out, _ = verb("sweep", plain, "--seeds", "3")
    assert {path.name[-5:] for job, path in ran if job == "score_run"} == {"seed0", "seed1", "seed2"}
    assert "3 seeds" in out
    assert yaml.safe_load((folder / "sweep.yaml").read_text())["sweep"]["seeds"] == [0, 1]  # it may be someone's by now


@pytest.mark.slow
def test_hours_hold_as_many_seeds_as_fit(plain, tmp_path, verb, monkeypatch):
    in_this_process(monkeypatch)
    seconds = iter([360.0] * 100)
    monkeypatch.setattr(forecast.Forecast, "seconds_of_run", lambda *_: next(seconds))
    monkeypatch.setattr(forecast.Forecast, "seconds_of_scoring", lambda *_: 180.0)
    out, _ = verb("sweep", plain, "--hours", "0.4")  # a seed of both arms takes 18 minutes
    assert "6 runs to search, then the best of each arm under as many seeds as 0.4 hours\n  hold\n" in out
    assert "seeds that fit: 0, 1\n" in out
    assert json.loads((tmp_path / "run-sweep" / "sweep.json").read_text())["seeds"] == [0, 1]
    assert "asked for" not in out
    out, _ = verb("sweep", plain, "--hours", "0.01", f"output_dir={tmp_path}/other")
    assert out.count("that is more than the 0.01 h asked for: Ctrl-C, then fewer arms") == 1
    _, err = verb("sweep", plain, "--hours", "1", "--seeds", "2", expect=2)
    assert "--seeds, --hours: one says how many seeds" in err


def test_how_long_it_takes_is_said_once_the_first_step_is_done(plain, tmp_path, verb, monkeypatch):
    in_this_process(monkeypatch)
    monkeypatch.setattr(forecast, "last_logged", lambda _: forecast.Logged(1, 100.0))
    lost = work.Failure("diverged at step 2", 3, work.Cause.DIVERGED)
    monkeypatch.setattr(runner, "train_run", lambda _: lost)
    out, _ = verb("sweep", plain, expect=3)
    lines = out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if "by the first steps" in line)
    assert lines[at].startswith("     about 23 min left, until ")  # of six runs a step each, and four more whole
    assert lines[at - 1].startswith("loading the model")
    assert "   1/10 trained  " in lines[at + 1 : at + 3][-1]


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_other_steps_than_the_runs_that_are_there_are_told_in_one_line(flags, plain, tmp_path, verb, monkeypatch):
    """Half a sweep lies there: two of its runs, as one that was stopped leaves them."""
    ran = in_this_process(monkeypatch)
    for arm in load_sweep(plain).points.values():
        folder = arm[0].folder
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(arm[0].recipe.model_dump()))
    verb("sweep", plain, "--dry-run")
    _, err = verb("sweep", plain, "train.max_steps=3", *flags, expect=2)
    assert err == (
        f"error: train.max_steps: 3, but 2 runs in {tmp_path}/run-sweep were begun with 2; add output_dir=OTHER "
        "to begin anew, or give the value of before to go on\n"
    )
    _, err = verb("sweep", plain, "train.max_steps=null", *flags, "--only", "pool", expect=2)
    assert err.startswith(f"error: train.max_steps: not set, but 1 run in {tmp_path}/run-sweep was begun with 2; ")
    assert len(err.splitlines()) == 1
    assert not ran


def test_a_dry_run_says_how_large_the_runs_are(plain, tmp_path, verb):
    out, _ = verb("sweep", plain, "--dry-run")
    assert "then 4 more: the best of each arm under seeds 1, 2" in out
    assert out.count("learning_rate=") == 2 * 6
    assert "each run: 2 steps of 8 rows, 176 tokens\nwarning: held-out rows: " in out
    assert out.endswith("how long they take is measured over the first steps\n")
    assert not (tmp_path / "run-sweep").exists()
    out, _ = verb("sweep", plain, "--dry-run", "model.name_or_path=nowhere/at-all")
    assert "how large they are is not known: " in out
