"""Sweeps: what a file stands for, and a whole one from search to table."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from helpers.common import ROOT
from helpers.tiny import recipe_text, write_recipe, write_rows
from helpers.workers import in_this_process

from remix_cli import errors
from remix_cli.errors import RecipeError
from remix_cli.recipe.sweep_grammar import describe, load_sweep
from remix_cli.runs import RunFolder
from remix_cli.sweep import runner as sweep_run
from remix_cli.sweep import work
from remix_cli.sweep.pool import Asked
from remix_cli.sweep.record import SearchedPoint
from remix_cli.sweep.report import edges

ARMS = {
    "LoRA": {"adapter": {"method": "rslora", "rank": 4}},
    "ReMix": {"train.learning_rate": [0.005, 0.02], "router.selections": 2},
}


def sweep_file(stage, tmp_path, sweep, **groups):
    model, data, _ = stage
    test = write_rows(tmp_path / "test.jsonl", 12, seed=7)
    recipe = recipe_text(model, data, tmp_path / "out", **groups)
    source = {"path": str(test), "format": "gsm8k"}
    recipe["eval"] = {"tasks": [{"task": "nll", "source": source}]}
    return write_recipe(tmp_path / "sweep.yaml", recipe | {"sweep": sweep})


def test_lists_make_a_grid_for_each_arm(stage, tmp_path):
    path = sweep_file(stage, tmp_path, {"arms": ARMS, "seeds": [3, 4]}, router={"learning_rate": [0.1, 0.3]})
    sweep = load_sweep(path)
    # a list of the recipe counts for the arms that read the key, that of an arm for it alone
    assert [point.setting for point in sweep.points["LoRA"]] == [{}]
    assert len(sweep.points["ReMix"]) == 4
    last = sweep.points["ReMix"][-1]
    assert (last.recipe.train.learning_rate, last.recipe.router.learning_rate, last.recipe.seed) == (0.02, 0.3, 3)
    name = "router.learning_rate=0.3-train.learning_rate=0.02-seed3"
    assert last.folder == tmp_path / "out" / "ReMix" / name
    again = sweep.under(last, 4)
    assert (again.recipe.seed, again.folder.name.endswith("seed4")) == (4, True)
    folders = [point.folder for points in sweep.points.values() for point in points]
    assert len(set(folders)) == 5
    assert sweep.metric == "eval_loss"


def test_shared_settings_of_the_router_are_for_the_arms_that_read_them(stage, tmp_path):
    arms = ARMS | {"fixed": {"router.fixed": True}}
    shared = {"estimator": "rtg", "init_std": 1.0}
    points = load_sweep(sweep_file(stage, tmp_path, {"arms": arms}, router=shared)).points
    assert points["ReMix"][0].recipe.router.estimator == "rtg"
    assert points["fixed"][0].recipe.router.init_std == 1.0
    wrong = {"LoRA": ARMS["LoRA"] | {"router.estimator": "rtg"}}
    with pytest.raises(RecipeError, match=r"router.estimator: is not read: it does nothing for .* rslora"):
        load_sweep(sweep_file(stage, tmp_path, {"arms": wrong}))


def test_what_no_arm_reads_is_refused_and_what_some_read_is_theirs(stage, tmp_path):
    load_sweep(sweep_file(stage, tmp_path, {}, router={"fixed": True}))  # selections has its default
    path = sweep_file(stage, tmp_path, {}, router={"fixed": True, "selections": 4})
    with pytest.raises(RecipeError) as refused:
        load_sweep(path)
    (line,) = refused.value.problems
    assert "sweep.yaml:" in line
    assert "router.selections: is not read" in line
    alarmed = load_sweep(sweep_file(stage, tmp_path, {"arms": ARMS}, alarm={"patience": 3})).points
    assert [alarmed[arm][0].recipe.alarm.patience for arm in ARMS] == [10, 3]
    own = {"arms": ARMS | {"LoRA": ARMS["LoRA"] | {"alarm.patience": 3}}}
    with pytest.raises(RecipeError, match=r"sweep.arms.LoRA: .*alarm.patience: is not read"):
        load_sweep(sweep_file(stage, tmp_path, own))
    constant = {"constant": {"train.lr_scheduler_type": "constant"}, "cosine": {}}
    warm = load_sweep(sweep_file(stage, tmp_path, {"arms": constant}, train={"warmup_ratio": [0.0, 0.1]})).points
    assert [len(points) for points in warm.values()] == [1, 2]


def test_an_axis_counts_in_the_whole_grid_or_nowhere(stage, tmp_path):
    both = {"lr_scheduler_type": ["constant", "cosine"], "warmup_ratio": [0.0, 0.1]}
    with pytest.raises(RecipeError, match=r"train.warmup_ratio: not all of the arm's settings read it"):
        load_sweep(sweep_file(stage, tmp_path, {}, train=both))
    some = load_sweep(sweep_file(stage, tmp_path, {}, adapter={"active": [2, 4]}, router={"estimator": "rtg"}))
    assert [p.recipe.router.estimator for p in some.points["run"]] == ["rtg", "control_variate"]


def test_a_file_may_hold_out_rows_for_all_runs(stage, tmp_path):
    held = write_rows(tmp_path / "held.jsonl", 8, seed=9)
    data = {"validation": [{"path": str(held), "format": "gsm8k"}], "validation_fraction": 0.05}
    (point,) = load_sweep(sweep_file(stage, tmp_path, {}, data=data)).points["run"]
    assert point.recipe.data.split_seed is None


def test_lists_that_a_recipe_takes_anyway_are_no_axes(stage, tmp_path):
    path = sweep_file(stage, tmp_path, {}, adapter={"target_modules": ["up_proj", "down_proj"]})
    (point,) = load_sweep(path).points["run"]
    assert point.recipe.adapter.target_modules == ["up_proj", "down_proj"]
    path = sweep_file(stage, tmp_path, {}, adapter={"target_modules": [["up_proj"], ["up_proj", "down_proj"]]})
    assert [len(p.recipe.adapter.target_modules) for p in load_sweep(path).points["run"]] == [1, 2]


def test_one_seed_counts_once(stage, tmp_path):
    with pytest.raises(RecipeError, match=r"sweep.seeds: one seed twice"):
        load_sweep(sweep_file(stage, tmp_path, {"seeds": [0, 1, 0]}))


@pytest.mark.parametrize("axis", ["data.validation_fraction=[0.1, 0.2]", "data.split_seed=[0, 1]"])
def test_settings_are_chosen_by_the_same_held_out_rows(stage, tmp_path, axis):
    with pytest.raises(RecipeError, match="each value has other held-out rows"):
        load_sweep(sweep_file(stage, tmp_path, {}), [axis])


def test_whole_groups_may_be_listed_as_tied_settings(stage, tmp_path):
    path = sweep_file(stage, tmp_path, {})
    both = "adapter=[{method: rslora, rank: 4}, {method: remix, pool_size: 4, active: 2, rank: 2}]"
    points = load_sweep(path, [both]).points["run"]
    assert [p.recipe.adapter.method for p in points] == ["rslora", "remix"]


def test_random_points_are_distinct_in_range_and_always_the_same(stage, tmp_path):
    rates = {"train": {"learning_rate": {"log_uniform": [1e-4, 1e-1]}}}
    path = sweep_file(stage, tmp_path, {"draws": 20}, **rates)
    drawn = [p.recipe.train.learning_rate for p in load_sweep(path).points["run"]]
    assert drawn == [p.recipe.train.learning_rate for p in load_sweep(path).points["run"]]
    assert len(set(drawn)) == 20
    assert all(1e-4 <= rate <= 1e-1 for rate in drawn)
    assert 4 < sum(rate < 10**-2.5 for rate in drawn) < 16  # as many on each side of the logarithm's middle
    grid = {"train": {"learning_rate": [1e-3, 2e-3, 3e-3], "max_steps": [1, 2, 3]}}
    path = sweep_file(stage, tmp_path, {"draws": 5}, **grid)
    settings = [describe(p.setting) for p in load_sweep(path).points["run"]]
    assert len(set(settings)) == 5


WRONG = [
    ({"arms": {"A": {"adapter": {"method": "lora", "active": 3}}}}, [], "adapter.active: not a setting of lora"),
    ({"arms": {"A": {"trian.max_steps": 3}}}, [], "trian: unknown key"),
    ({"arms": {"A b": {}, "A-b": {}}}, [], "another arm's folder would have the same name, A-b"),
    ({"seed": [1]}, [], "sweep.seed: Extra inputs are not permitted; valid here: arms, seeds, draws, metric"),
    ({"seeds": []}, [], "sweep.seeds: List should have at least 1 item"),
    ({}, ["train.learning_rate=[]"], "train.learning_rate: an empty list has no value to try"),
    ({}, ["train.learning_rate={log_uniform: [1, 2]}"], "say in sweep.draws how many points to try"),
    ({"draws": 2}, ["train.learning_rate={log_uniform: [2, 1]}"], "log_uniform takes two numbers, 0 < low < high"),
    ({}, ["seed=[1, 2]"], "a sweep's seeds are sweep.seeds"),
    ({"arms": {"A": {"seed": 3}}}, [], "seed is the sweep's to set"),
    ({"seeds": [1, 2]}, ["seed=3"], "override: seed: is not read: sweep.seeds says under which seeds"),
    ({}, ["train.learning_rate=[0.1, 99]"], "train.learning_rate: should be less than or equal to 10, got 99"),
]


@pytest.mark.parametrize(("group", "overrides", "message"), WRONG)
def test_a_wrong_sweep_is_refused_before_anything_runs(group, overrides, message, stage, tmp_path):
    path = sweep_file(stage, tmp_path, group)
    with pytest.raises(RecipeError) as refused:
        load_sweep(path, overrides)
    assert any(message in line for line in refused.value.problems), refused.value.problems
    assert len(refused.value.problems) == (2 if "another arm" in message else 1)


def test_all_runs_have_the_same_held_out_rows_and_the_recipes_seed_is_the_default(stage, tmp_path):
    sweep = load_sweep(sweep_file(stage, tmp_path, {"seeds": [3, 4]}))
    (point,) = sweep.points["run"]
    assert point.recipe.data.split_seed == sweep.under(point, 4).recipe.data.split_seed == 3
    assert load_sweep(sweep_file(stage, tmp_path, {}), ["seed=7"]).seeds == [7]


def test_a_metric_that_is_not_measured_is_refused(stage, tmp_path, verb):
    path = sweep_file(stage, tmp_path, {"metric": "arc/letter"})
    _, err = verb("sweep", path, expect=2)
    assert "sweep.metric: arc/letter is not measured" in err


def test_what_every_run_would_refuse_is_refused_at_once(stage, tmp_path, verb):
    path = sweep_file(stage, tmp_path, {"arms": ARMS})
    _, err = verb("sweep", path, "data.train.0.path=nowhere.jsonl", expect=2)
    assert "sweep.arms.LoRA: data.train.0" in err
    assert not (tmp_path / "out").exists()


def test_train_points_to_sweep_and_the_reverse_is_one_run(stage, tmp_path, verb):
    path = sweep_file(stage, tmp_path, {})
    _, err = verb("train", path, expect=2)
    assert "it is for `remix sweep`" in err
    out, _ = verb("sweep", path, "--dry-run")
    assert "1 arms: run\n1 runs to search\n" in out
    assert "each run: 4 steps of 4 rows, 176 tokens\n" in out
    assert not (tmp_path / "out").exists()


def test_a_metric_that_no_run_measures_is_refused_by_a_dry_run_too(stage, tmp_path, verb):
    path = sweep_file(stage, tmp_path, {"metric": "nll/los"})
    _, err = verb("sweep", path, "--dry-run", expect=2)
    assert "sweep.metric: nll/los is not measured on held-out rows while training; use eval_loss" in err


def test_a_sweep_searches_chooses_repeats_tests_once_and_tabulates(stage, tmp_path, verb, monkeypatch):
    ran = in_this_process(monkeypatch)
    path = sweep_file(stage, tmp_path, {"arms": ARMS, "seeds": [0, 1]})
    out, _ = verb("sweep", path)
    trained = [folder for job, folder in ran if job == "train_run"]
    scored = [folder for job, folder in ran if job == "score_run"]
    assert len(trained) == 3 + 2
    assert len(scored) == 4
    document = json.loads((tmp_path / "out" / "sweep.json").read_text())
    for arm in document["arms"].values():
        values = [one["value"] for one in arm["searched"]]
        for one in arm["searched"]:
            lines = (tmp_path / "out" / one["run"] / "metrics.jsonl").read_text().splitlines()
            held = [json.loads(line)["eval_loss"] for line in lines if "eval_loss" in line]
            assert one["value"] == held[-1]
        assert arm["chosen"] == arm["searched"][values.index(min(values))]["setting"]
        assert {(tmp_path / "out" / report).parent.parent for report in arm["reports"]} <= set(scored)
    # the search's other points never saw the test rows
    lost = {tmp_path / "out" / one["run"] for arm in document["arms"].values() for one in arm["searched"]} - set(scored)
    assert len(lost) == 1
    assert not any(RunFolder(folder).evaluations.exists() for folder in lost)
    title = "loss on test.jsonl, nats per token\nmean over seeds, and difference from LoRA (95 % intervals)"
    assert title in "\n".join(line.rstrip() for line in out.splitlines())
    assert "held-out loss, nats per token: after the last step, mean over 2 seeds; the base" in out
    # the figures of the table, from the runs themselves
    report = json.loads(verb("compare", tmp_path / "out", "--json")[0])
    for arm in report["arms"]:
        files = [tmp_path / "out" / report for report in document["arms"][arm["arm"]]["reports"]]
        losses = [work.scored_tasks(file)["nll"].scores["loss"].value for file in files]
        assert arm["scores"]["nll loss"]["value"] == pytest.approx(np.mean(losses))
        assert arm["runs"] == arm["validation_runs"] == 2
        measured = [last_held_out(file.parent.parent) for file in files]
        assert arm["validation"] == pytest.approx(np.mean([values[-1] for values in measured]))
        assert report["base"] == pytest.approx(measured[1][0])  # that of another run: all began as the base model
        assert f" {arm['validation']:.4f} " in out
        seconds = [json.loads((file.parent.parent / "summary.json").read_text())["seconds"] for file in files]
        assert arm["train_seconds"] == min(seconds)
        summary = json.loads((files[0].parent.parent / "summary.json").read_text())
        assert arm["trained_parameters"] == summary["parameters"]["trained"]
    # one arm alone leaves the other in the table
    verb("sweep", path, "--only", "R.*")
    assert json.loads(verb("compare", tmp_path / "out", "--json")[0]) == report
    _, err = verb("sweep", path, "--only", "X", expect=2)
    assert "'X' matches no arm; there are LoRA, ReMix" in err
    # another question is asked anew, without training
    verb("sweep", path, "eval.tasks.0.limit=5")
    first = json.loads((tmp_path / "out" / document["arms"]["LoRA"]["reports"][0]).read_text())
    assert first["results"][0]["count"] == 5
    verb("sweep", path)
    assert (
        json.loads(verb("compare", tmp_path / "out", "--json")[0])["arms"][0]["scores"] == report["arms"][0]["scores"]
    )
    # again: nothing is trained or scored anew
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.jsonl")}
    verb("sweep", path)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.jsonl")}


def last_held_out(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record]


def test_an_arm_that_the_file_has_changed_is_refused_and_kept_out_of_the_table(stage, tmp_path, verb, monkeypatch):
    in_this_process(monkeypatch)
    arms = {"A": {"adapter.rank": 2}, "B": {"adapter.rank": 3}}
    path = sweep_file(stage, tmp_path, {"arms": arms})
    verb("sweep", path)
    path = sweep_file(stage, tmp_path, {"arms": arms | {"B": {"adapter.rank": 4}}})
    _, err = verb("sweep", path, expect=2)  # before anything is trained
    assert f"sweep.arms.B: adapter.rank: 4, but 1 run in {tmp_path}/out was begun with 3; add output_dir=" in err
    out, _ = verb("sweep", path, "--only", "A")
    assert "B: was run before with other settings than the file now has" in out
    assert list(json.loads((tmp_path / "out" / "sweep.json").read_text())["arms"]) == ["A"]


def test_runs_on_other_rows_are_not_compared(stage, tmp_path, verb, monkeypatch):
    """A data file that changes while a sweep waits to go on: what is complete is not trained again."""
    in_this_process(monkeypatch)
    rows = write_rows(tmp_path / "rows.jsonl", 20, seed=1)
    path = sweep_file((stage[0], rows, None), tmp_path, {"arms": {"A": {"adapter.rank": 2}}})
    verb("sweep", path)
    write_rows(rows, 20, seed=2)
    path = sweep_file((stage[0], rows, None), tmp_path, {"arms": {"A": {"adapter.rank": 2}, "B": {"adapter.rank": 3}}})
    _, err = verb("sweep", path, expect=2)
    assert "B/seed0: trained on other rows than " in err
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["arms"]["B"]["reports"] == []


def test_a_part_of_the_answers_is_no_answer(stage, tmp_path, verb, monkeypatch):
    """What `remix eval` left of fewer rows, or of another adapter, is neither averaged nor taken for the score."""
    in_this_process(monkeypatch)
    path = sweep_file(stage, tmp_path, {"seeds": [0, 1]})
    verb("sweep", path)
    arm = tmp_path / "out" / "run"
    whole = json.loads(verb("compare", tmp_path / "out", "--json")[0])
    verb("eval", arm / "seed1", "--limit", 1)
    found = json.loads(verb("compare", tmp_path / "out", "--json")[0])
    assert found["arms"][0]["scores"] == {}
    assert found["skipped"] == ["nll: other data, other prompts"]
    assert "\nnot in these tables: nll: other data, other prompts\n" in verb("compare", tmp_path / "out")[0]
    verb("sweep", path)  # asks again
    assert json.loads(verb("compare", tmp_path / "out", "--json")[0])["arms"] == whole["arms"]
    for file in (arm / "seed0" / "eval").iterdir():
        (arm / "seed1" / "eval" / file.name).write_bytes(file.read_bytes())
    _, err = verb("compare", tmp_path / "out", expect=5)
    assert err.endswith("scores of another adapter than " + f"{arm / 'seed1' / 'adapter'} now holds; evaluate again\n")
    verb("sweep", path)
    assert json.loads(verb("compare", tmp_path / "out", "--json")[0])["arms"] == whole["arms"]


def failing(monkeypatch, problems):
    """The runs at rate 0.02 end with these problems, one after the other, and then well."""
    real, left = work.train_run, list(problems)

    def one_fails(recipe):
        return left.pop(0) if recipe.train.learning_rate == 0.02 and left else real(recipe)

    monkeypatch.setattr(sweep_run, "train_run", one_fails)


TWO_RATES = {"arms": {"A": {"train.learning_rate": [0.02, 0.01]}}}


def test_a_setting_that_diverges_loses(stage, tmp_path, verb, monkeypatch):
    in_this_process(monkeypatch)
    failing(monkeypatch, [work.Failure("diverged at step 1: loss nan", 3, work.Cause.DIVERGED)])
    verb("sweep", sweep_file(stage, tmp_path, TWO_RATES))
    arm = json.loads((tmp_path / "out" / "sweep.json").read_text())["arms"]["A"]
    first, second = arm["searched"]
    assert (first["value"], first["error"]) == (None, "diverged at step 1: loss nan")
    assert arm["chosen"] == second["setting"] == {"train.learning_rate": 0.01}


def raising(error, *_, **__):
    raise error


def test_a_sweep_ends_with_the_exit_code_of_its_first_failed_run(stage, tmp_path, verb, monkeypatch):
    in_this_process(monkeypatch)
    path = sweep_file(stage, tmp_path, {"arms": {"A": {"train.learning_rate": 9.0, "train.max_grad_norm": 1e30}}})
    real = work.train_run
    monkeypatch.setattr(
        sweep_run, "train_run", lambda recipe: work.Failure("diverged at step 1", 3, work.Cause.DIVERGED)
    )
    _, err = verb("sweep", path, expect=3)
    assert err.splitlines()[-1].startswith("error: failed: sweep.arms.A; mend the cause")
    monkeypatch.setattr(sweep_run, "train_run", real)
    monkeypatch.setattr("remix_cli.train.trainer.train", lambda *_, **__: [][0])  # a bug of ours
    _, err = verb("sweep", path, expect=1)
    assert "A/seed0: IndexError" in err
    for error, code in ((errors.ArtefactError("x"), 5), (MemoryError(), 2), (errors.StorageError("x"), 4)):
        monkeypatch.setattr("remix_cli.train.trainer.train", functools.partial(raising, error))
        _, err = verb("sweep", path, expect=code)


def test_an_arm_is_not_chosen_from_while_a_setting_of_it_failed(stage, tmp_path, verb, monkeypatch):
    ran = in_this_process(monkeypatch)
    failing(monkeypatch, [work.Failure("disk full", 4)])
    path = sweep_file(stage, tmp_path, TWO_RATES)
    _, err = verb("sweep", path, expect=4)
    first, last = err.splitlines()
    assert first.endswith("learning_rate=0.02-seed0: disk full")
    assert "failed: " in last
    assert "learning_rate=0.02-seed0; mend the cause (logs are beside the run folders) and give the same" in last
    arm = json.loads((tmp_path / "out" / "sweep.json").read_text())["arms"]["A"]
    assert (arm["chosen"], arm["reports"]) == (None, [])
    assert not any(job == "score_run" for job, _ in ran)
    verb("sweep", path)  # the cause mended, the same command goes on
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["arms"]["A"]["chosen"] is not None


def test_what_lacks_memory_is_tried_again_beside_fewer(stage, tmp_path, verb, monkeypatch):
    in_this_process(monkeypatch)
    lacking = [work.Failure("out of memory: OutOfMemoryError", 2, work.Cause.NO_MEMORY)]
    failing(monkeypatch, lacking * 2)
    path = sweep_file(stage, tmp_path, TWO_RATES)
    out, _ = verb("sweep", path, "--processes", "4")
    assert "1 run lacked memory; now 2 at a time" in out
    assert "1 run lacked memory; now one at a time" in out
    arm = json.loads((tmp_path / "out" / "sweep.json").read_text())["arms"]["A"]
    assert all(one["error"] is None for one in arm["searched"])
    assert arm["chosen"] is not None


def test_a_sweep_that_is_not_finished_is_called_so(finished, tmp_path, verb):
    (tmp_path / "sweep" / "A" / "seed0").mkdir(parents=True)
    (tmp_path / "sweep" / "A" / "seed0" / "recipe.yaml").write_text("")
    _, err = verb("compare", tmp_path / "sweep", expect=5)
    assert err.endswith("this sweep has not come to its end; the `remix sweep` that began it goes on\n")
    _, err = verb("compare", tmp_path / "sweep", finished, expect=5)
    assert err.endswith("a sweep, not a run; compare it alone, or name runs of it\n")


def test_settings_that_are_lists_or_groups_have_no_edges():
    """A sweep over target modules or tied settings ended in an error, after all its runs."""
    values = [(["up_proj"], 1), (["down_proj"], 2), ({"rank": 4}, 3)]
    searched = [SearchedPoint({"a": a, "b": b}, "r", 1.0) for a, b in values]
    assert edges(searched, {"a": ["up_proj"], "b": 3}) == ["b=3"]
    assert edges(searched, {"a": {"rank": 4}, "b": 2}) == []


ARM = {"searched": [{"setting": {}, "run": "A/seed0", "value": 1.0, "error": None}], "chosen": {}, "reports": []}
WHOLE = {"metric": "eval_loss", "seeds": [0], "arms": {"A": ARM}}
DAMAGED = [
    *("{", "[1]", "5", "[" * 100_000),
    *({k: v for k, v in WHOLE.items() if k != key} for key in WHOLE),
    *({**WHOLE, key: 7} for key in WHOLE),
    *({**WHOLE, "arms": {"A": {k: v for k, v in ARM.items() if k != key}}} for key in ARM),
    *({**WHOLE, "arms": {"A": {**ARM, key: 7}}} for key in ARM),
    *({**WHOLE, "arms": {"A": arm}} for arm in (7, {**ARM, "reports": [7]}, {**ARM, "searched": [7]})),
    {**WHOLE, "arms": {"A": {**ARM, "searched": [{"value": 1.0}]}}},
]


def test_a_damaged_sweep_file_is_named_by_every_verb_and_nothing_is_trained(stage, tmp_path, verb, monkeypatch):
    ran = in_this_process(monkeypatch)
    path = sweep_file(stage, tmp_path, {"arms": {"A": {"adapter.rank": 2}}})
    (tmp_path / "out").mkdir()
    for damage in DAMAGED:
        (tmp_path / "out" / "sweep.json").write_text(damage if isinstance(damage, str) else json.dumps(damage))
        _, err = verb("compare", tmp_path / "out", expect=5)
        assert "sweep.json: " in err
        assert len(err.splitlines()) == 1
    for asked in ([], ["--only", "A"]):
        assert "sweep.json: " in verb("sweep", path, *asked, expect=5)[1]
    assert not ran
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(WHOLE))
    assert "no arm of this sweep has a run that is trained and scored" in verb("compare", tmp_path / "out", expect=5)[1]


def stopping_after(monkeypatch, count):
    """A sweep in this process that SIGTERM reaches after so many jobs; what they did is noted."""
    ran = in_this_process(monkeypatch)
    pool = sweep_run.Pool

    class Stopped(pool):
        def until_idle(self, look):
            def looks():
                look()
                if len(ran) == count:
                    raise Asked(signal.SIGTERM)

            super().until_idle(looks)

    monkeypatch.setattr(sweep_run, "Pool", Stopped)
    return ran


def test_a_sweep_that_is_stopped_shows_what_there_is(stage, tmp_path, verb, monkeypatch):
    """Seed by seed, scores before the next seed: all arms stand under the first when it is stopped in the second."""
    path = sweep_file(stage, tmp_path, {"arms": ARMS, "seeds": [0, 1, 2]})
    ran = stopping_after(monkeypatch, 6)
    _, err = verb("sweep", path, expect=143)
    assert f"remix compare {tmp_path / 'out'}" in err.replace("\n", " ").replace("  ", " ")
    seeds = [folder.name.rpartition("seed")[2] for _, folder in ran]
    assert seeds == ["0"] * 5 + ["1"]
    assert [job for job, _ in ran] == ["train_run"] * 3 + ["score_run"] * 2 + ["train_run"]
    report = json.loads(verb("compare", tmp_path / "out", "--json")[0])
    assert [arm["arm"] for arm in report["arms"]] == list(ARMS)
    assert report["skipped"] == ["stopped with 3 runs still to do; the same `remix sweep` goes on"]
    # with all runs trained and the last not scored it is not whole either, and says so
    ran = stopping_after(monkeypatch, 11)  # of 13: what is there counts again
    verb("sweep", path, expect=143)
    assert ran[-1][0] == "train_run"
    report = json.loads(verb("compare", tmp_path / "out", "--json")[0])
    assert report["skipped"] == ["stopped with scoring still to do; the same `remix sweep` goes on"]
    # a whole one stays when a further command is stopped
    in_this_process(monkeypatch)
    verb("sweep", path)
    whole = (tmp_path / "out" / "sweep.json").read_bytes()
    assert json.loads(whole).get("left") is None
    stopping_after(monkeypatch, 0)
    verb("sweep", path, expect=143)
    assert (tmp_path / "out" / "sweep.json").read_bytes() == whole


@pytest.fixture
def two_workers(stage, tmp_path):
    """(sweep file, a sweep of three runs by two worker processes that have begun to train)."""
    many = {"max_steps": 40, "save_steps": 5, "eval_steps": 40}
    rates = [0.02, 0.01, 0.015]
    path = sweep_file(stage, tmp_path, {"arms": {"A": {"train.learning_rate": rates}}}, train=many)
    command = [sys.executable, "-m", "remix_cli", "sweep", str(path), "--processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("step-*/manifest.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    yield path, process
    process.kill()
    process.wait()


def test_worker_processes_survive_an_interruption_and_the_sweep_goes_on(two_workers, tmp_path, verb, monkeypatch):
    """Two processes; SIGTERM once a checkpoint is there; the same command finishes without redoing it."""
    path, process = two_workers
    begun = set((tmp_path / "out").rglob("*.log"))
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert "the same command goes on" in told
    assert "Traceback" not in told
    assert set((tmp_path / "out").rglob("*.log")) == begun  # what was dealt to a worker already is not begun
    kept = len(list((tmp_path / "out").rglob("step-*/manifest.json")))
    assert kept
    in_this_process(monkeypatch)  # the rest here, which is quicker
    verb("sweep", path)
    logs = [p.read_text() for p in (tmp_path / "out").rglob("*.log")]
    assert len(logs) == 3
    assert any("steps     0 -> 40" not in log.rpartition("train     ")[2] for log in logs)  # one at least went on
    assert (tmp_path / "out" / "sweep.json").is_file()


def test_workers_end_with_a_parent_that_is_killed(two_workers, tmp_path):
    """They save first; nobody is left to write to the pipe that they share with it."""
    _, process = two_workers
    process.kill()
    begun = time.monotonic()
    process.communicate(timeout=20)  # until nobody holds the other end: the workers do
    assert time.monotonic() - begun < work.PATIENCE + 2
    for metrics in (tmp_path / "out").rglob("metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        kept = [int(p.name[5:]) for p in metrics.parent.glob("checkpoints/step-*")]
        assert max(kept, default=0) == steps[-1]


def test_budget_meets_its_target_for_every_method(stage, tmp_path, verb):
    model, data, _ = stage
    recipe = recipe_text(model, data, tmp_path / "run")
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    found = json.loads(verb("budget", path, "--parameters", "20000", "--count", "trained", "--json")[0])
    sizes = {(size["method"], size["knob"]): size for size in found["methods"]}
    assert {method for method, _ in sizes} == {
        *("remix", "mixlora", "hydralora", "milora", "remix_modules", "lora", "rslora", "reslora"),
        *("dora", "ia3", "vblora", "prefix", "prompt", "p_tuning"),
    }
    for (method, knob), size in sizes.items():
        if knob and not size["problem"]:
            assert size["trained"] == pytest.approx(20000, rel=0.08), (method, knob)
    # what it says is what a run of that size has
    rank = sizes["dora", "rank"]["value"]
    out, _ = verb("validate", path, f"adapter={{method: dora, rank: {rank}}}", "--json")
    assert json.loads(out)["parameters"]["trained"] == sizes["dora", "rank"]["trained"]
    hydra = sizes["hydralora", "pool_size"]["value"]
    out, _ = verb("validate", path, f"adapter={{method: hydralora, rank: 3, pool_size: {hydra}}}", "--json")
    assert json.loads(out)["parameters"]["trained"] == sizes["hydralora", "pool_size"]["trained"]
    out, _ = verb("budget", path)
    assert "no size to choose" in out
    own = json.loads(verb("validate", path, "--json")[0])["parameters"]["active"]
    assert f"{own:,} active parameters" in out


SWEEPS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in SWEEPS if "sweep" in yaml.safe_load(p.read_text())], ids=lambda p: p.name)
def test_every_sweep_file_of_ours_loads(path):
    sweep = load_sweep(path)
    assert len(sweep.points) > 1
    assert f"remix sweep {path.relative_to(ROOT)}" in path.read_text().splitlines()[0]


def test_a_budget_beyond_any_adapter_is_refused(stage, tmp_path, verb):
    model, data, _ = stage
    path = write_recipe(tmp_path / "r.yaml", recipe_text(model, data, tmp_path / "out"))
    for absurd in (10**15, 10**30):
        _, err = verb("budget", path, "--parameters", absurd, expect=2)
        assert err.startswith(f"error: --parameters: {absurd:,} are more than four times the model itself (5,968)")


def test_arms_are_matched_in_a_bounded_time(stage, tmp_path):
    path = sweep_file(stage, tmp_path, {"arms": {"a-name-that-is-not-so-very-long": {}}})
    with pytest.raises(RecipeError, match="takes too long to match"):
        load_sweep(path, only=r"(.|\w|a)+[#!]")
