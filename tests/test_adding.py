"""The rule of the house: adding a thing is one new file and one line in a registry. Here the file is an example."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers.common import HEAVY, ROOT, alone
from helpers.tiny import recipe_text, write_recipe

from remix_cli.core.estimators.registry import ESTIMATORS, EstimatorFacts
from remix_cli.data.formats.registry import FORMATS, FormatFacts
from remix_cli.errors import DivergedError
from remix_cli.methods.registry import METHODS
from remix_cli.recipe.schema import cost
from remix_cli.recipe.sweep_grammar import load_sweep
from remix_cli.tasks.registry import TASKS
from remix_cli.train import trainer
from remix_cli.verify import exact


@pytest.fixture
def a_task(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setitem(TASKS, "terse", "own_task:Terse")


@pytest.mark.usefixtures("a_task")
def test_a_task_is_one_file_and_one_line(verb, stage, tmp_path):
    """Training scores it, shows it and chooses by it, in its direction; so do eval, compare and sweeps."""
    tasks = {"tasks": [{"task": "terse"}]}
    train = {"eval_tasks_limit": 5, "metric_for_best_model": "terse/words", "max_steps": 6, "learning_rate": 0.2}
    recipe = recipe_text(*stage[:2], tmp_path / "run", eval=tasks, train=train)
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    out, _ = verb("train", path)
    assert "terse/words" in out, "a line of the console"
    assert "terse/has_number" not in out, "which is not among those shown"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval_loss" in line]
    words = [line["terse/words"] for line in measured]
    assert len(set(words)) > 1, "else nothing is chosen"
    assert [line["best"] for line in measured] == [x < min([*words[:i], 1e9]) for i, x in enumerate(words)]

    reports = [json.loads(verb("eval", tmp_path / "run", *more, "--json")[0]) for more in ([], ["--base"])]
    for report in reports:
        (result,) = report["results"]
        assert result["scores"].keys() == {"words", "has_number"}
        assert result["shares"] == ["has_number"]
        kept = (tmp_path / "run" / "eval" / f"{report['model']}-terse.jsonl").read_text().splitlines()
        of_each = [json.loads(line)["words"] for line in kept]
        assert result["scores"]["words"] == pytest.approx(sum(of_each) / len(of_each))
    files = [report["file"] for report in reports]
    compared = json.loads(verb("compare", *files, "--json")[0])["tasks"]["terse"]["scores"]
    assert compared.keys() == {"words", "has_number"}
    difference = reports[1]["results"][0]["scores"]["words"] - reports[0]["results"][0]["scores"]["words"]
    assert compared["words"][1]["difference"] == pytest.approx(difference)

    other = tmp_path / "rows.jsonl"
    other.write_text(stage[1].read_text())
    result = json.loads(verb("eval", tmp_path / "run", "--task", "terse", "--data", other, "--json")[0])["results"][0]
    assert result["count"] == len(other.read_text().splitlines()), "rows in the format that the task declares"

    arms = {"one": {}, "two": {"train.learning_rate": [0.1, 0.2]}}
    recipe |= {"sweep": {"metric": "terse/words", "seeds": [0], "arms": arms}, "output_dir": str(tmp_path / "all")}
    points = load_sweep(write_recipe(tmp_path / "sweep.yaml", recipe), []).points["two"]
    assert [cost("terse/words", 3.0, point.recipe.eval.tasks) for point in points] == [3.0, 3.0]
    assert cost("terse/has_number", 0.5, points[0].recipe.eval.tasks) == -0.5


@pytest.fixture
def an_estimator(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    facts = EstimatorFacts("own_estimator:MovingBaseline", "batch loss against its running mean", True, 1)
    monkeypatch.setitem(ESTIMATORS, "moving_baseline", facts)


@pytest.mark.usefixtures("an_estimator")
def test_an_estimator_is_one_file_and_one_entry(verb, stage, tmp_path, monkeypatch):
    """It trains with M = 1, keeps what it has learnt over a stop, is described, and its claim is checked."""
    router = {"estimator": "moving_baseline", "selections": 1, "learning_rate": 0.3}
    recipes = []
    for name in ("whole", "stopped"):
        recipe = recipe_text(*stage[:2], tmp_path / name, router=router)
        recipes.append(write_recipe(tmp_path / f"{name}.yaml", recipe))
    assert "moving_baseline, M = 1: batch loss against its running mean" in verb("train", recipes[0])[0]
    states = [json.loads(path.read_text())["coefficient"] for path in tmp_path.glob("whole/checkpoints/*/state.json")]
    assert all(set(state) == {"mean"} for state in states)
    assert states[0]["mean"] != states[-1]["mean"]

    step = trainer.Trainer._step

    def stop_at_three(run, number):
        if number == 3:
            raise DivergedError("stop")
        return step(run, number)

    monkeypatch.setattr(trainer.Trainer, "_step", stop_at_three)
    verb("train", recipes[1], expect=3)
    monkeypatch.setattr(trainer.Trainer, "_step", step)
    verb("train", recipes[1], "--resume")
    adapters = [(tmp_path / name / "adapter" / "adapter.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert adapters[0] == adapters[1]

    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["estimator"] == {"name": "moving_baseline", "unbiased": True}
    found = exact.exact_biases(estimator="moving_baseline")
    assert [bias.arm for bias in found] == ["moving_baseline", "moving_baseline, two rows by sequence"]
    assert all(bias.relative < exact.TOLERANCE for bias in found)
    said = json.loads(verb("verify-estimator", "moving_baseline", "--json")[0])
    assert (said["sound"], len(said["bias"]), said["variance"]) == (True, 2, [])
    assert "moving: no such estimator; use paper, rtg" in verb("verify-estimator", "moving", expect=2)[1]
    err = verb("validate", recipes[0], "router.estimator=moving", expect=2)[1]
    assert "'straight_through' or 'moving_baseline'" in err


def test_a_format_is_one_file_and_one_line(verb, stage, tmp_path, monkeypatch):
    """Trained on, scored with `--data`, refused with the row where a column is missing."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setitem(FORMATS, "ask_reply", FormatFacts("own_format:read"))
    rows = [json.loads(line) for line in stage[1].read_text().splitlines()]
    lines = [json.dumps({"ask": row["question"], "reply": row["answer"]}) for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    recipe = recipe_text(*stage[:2], tmp_path / "run")
    recipe["data"]["train"] = [{"path": str(path), "format": "ask_reply"}]
    verb("train", write_recipe(tmp_path / "recipe.yaml", recipe))
    more = ["--data", path, "--data-format", "ask_reply", "--task", "nll", "--json"]
    assert json.loads(verb("eval", tmp_path / "run", *more)[0])["results"][0]["count"] == len(rows)

    err = verb("validate", tmp_path / "recipe.yaml", "data.train.0.prompt='{ask}'", expect=2)[1]
    assert "belongs to format prompt_completion, and this is ask_reply" in err
    err = verb("validate", tmp_path / "recipe.yaml", "data.train.0.format=ask", expect=2)[1]
    assert "'codealpaca' or 'ask_reply'" in err
    path.write_text("\n".join([*lines, json.dumps({"ask": "w1"})]))
    err = verb("validate", tmp_path / "recipe.yaml", expect=2)[1]
    assert "row 41" in err
    assert "reply" in err


@pytest.fixture
def a_method(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setitem(METHODS, "bitfit", "own_method:BitFit")


@pytest.mark.usefixtures("a_method")
def test_a_method_is_one_file_and_one_line(verb, stage, tmp_path):
    """Trained from the base model on at its own rate, resumed to the same bits, scored, compared, sized, swept."""
    recipe = recipe_text(*stage[:2], tmp_path / "run") | {"adapter": {"method": "bitfit"}}
    del recipe["router"], recipe["train"]["learning_rate"]
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    out, _ = verb("train", path)
    assert "bitfit: a bias for every target (arXiv 2106.10199)" in out
    assert "128 trained (other 128)" in out, "2 layers, widths 24, 24 and 16"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["train"]["learning_rate"] == 1e-2

    trained = (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes()
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    verb("train", path, "--resume")
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes() == trained

    reports = [json.loads(verb("eval", tmp_path / "run", *more, "--json")[0]) for more in ([], ["--base"])]
    losses = [report["results"][0]["scores"]["loss"] for report in reports]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses == [pytest.approx(held_out[-1], rel=1e-5), pytest.approx(held_out[0], rel=1e-5)]
    compared = json.loads(verb("compare", *[report["file"] for report in reports], "--json")[0])["tasks"]["nll"]
    assert compared["scores"]["loss"][1]["difference"] == pytest.approx(losses[1] - losses[0])

    sizes = json.loads(verb("budget", path, "--json")[0])["methods"]
    (own,) = [size for size in sizes if size["method"] == "bitfit"]
    assert (own["knob"], own["trained"]) == ("", 128)
    sweep = {"metric": "eval_loss", "seeds": [0, 1], "arms": {"bias": {"train.learning_rate": [0.01, 0.02]}}}
    points = load_sweep(write_recipe(tmp_path / "sweep.yaml", recipe | {"sweep": sweep}), []).points["bias"]
    assert [point.recipe.adapter.method for point in points] == ["bitfit", "bitfit"]


@pytest.mark.usefixtures("a_method")
def test_what_a_method_does_not_declare_is_refused_in_one_line(verb, stage, tmp_path):
    recipe = recipe_text(*stage[:2], tmp_path / "run", train={"max_steps": 1}) | {"adapter": {"method": "bitfit"}}
    del recipe["router"]
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    refusals = {
        "adapter.rank=4": "not a setting of bitfit, which takes target_modules",
        "router.estimator=rtg": "does nothing for adapter.method bitfit",
        "alarm.ess=2": "adapter.method bitfit has none",
        "train.shard_base=true": "adapter.method: bitfit (sharding was tried with LoRAs alone)",
        "adapter.method=bitfits": "'none' or 'bitfit'",
    }
    for key, line in refusals.items():
        assert line in verb("validate", path, key, expect=2)[1]
    verb("train", path)
    err = verb("route-stats", tmp_path / "run", expect=2)[1]
    assert "trained by bitfit, which has no router" in err
    err = verb("export", tmp_path / "run", "--format", "peft", "-o", tmp_path / "out", expect=2)[1]
    assert "--format peft: bitfit has biases where the base model has none; no format can hold it" in err


WITH_A_SETTING = """
import json
from pathlib import Path
from own_method import BitFit
from remix_cli.core.config import AdapterConfig
from remix_cli.methods.base import Count, Setting
from remix_cli.methods.registry import METHODS

class Sparse(BitFit):
    own_settings = {"every": Setting(Count, 2, "targets to one bias.")}
    settings = ("target_modules", *own_settings)

METHODS["sparse"] = "__main__:Sparse"
from remix_cli.recipe import load_recipe
from remix_cli.recipe.loader import dump
from remix_cli.recipe.schema import Adapter

given, silent = (load_recipe(PATH, ["adapter={method: sparse" + more + "}"]) for more in (", every: 3", ""))
assert given.adapter_config().settings == {"every": 3}
assert silent.adapter_config().settings == {"every": 2}
written = json.loads(json.dumps(given.adapter_config().to_dict()))
assert AdapterConfig.from_dict(written) == given.adapter_config()
assert "every: 3" in dump(given)
assert Adapter.model_json_schema()["properties"]["every"]["description"] == "sparse: targets to one bias."
load_recipe(PATH, ["adapter={method: lora, every: 3}"])
"""


def test_a_method_brings_its_own_settings_along(tmp_path):
    """Checked in recipes, described in the schema, kept in the adapter folder; of no other method."""
    recipe = recipe_text("models/x", tmp_path / "rows.jsonl", tmp_path / "run")
    del recipe["router"]
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    code = WITH_A_SETTING.replace("PATH", repr(path).replace("PosixPath", "Path"))
    done = alone(f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r})\n{code}")
    assert "adapter.every: not a setting of lora, which takes rank, " in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.usefixtures("a_task")
def test_what_a_task_does_not_read_is_refused_by_what_it_declares(verb, stage, tmp_path):
    recipe = recipe_text(*stage[:2], tmp_path / "run", eval={"tasks": [{"task": "terse", "samples": 3}]})
    err = verb("validate", write_recipe(tmp_path / "recipe.yaml", recipe), expect=2)[1]
    assert "more than one answer per problem is for humaneval" in err
    recipe["eval"] = {"tasks": [{"task": "tersee"}]}
    err = verb("validate", write_recipe(tmp_path / "recipe.yaml", recipe), expect=2)[1]
    assert "'reasoning_gym' or 'terse'" in err


def test_every_task_declares_what_others_need_to_know():
    from remix_cli.tasks.registry import task_classes

    for name, kind in task_classes().items():
        assert kind.name == name
        measures = {measure.name: measure for measure in kind.measures}
        assert len(measures) == len(kind.measures)
        assert any(measure.above for measure in kind.measures), "or nothing of it can be compared"
        assert all(measure.chooses for measure in kind.measures if measure.shown)


def test_checking_a_recipe_with_every_task_and_method_needs_nothing_heavy():
    code = (
        "import sys\n"
        "from remix_cli.methods.registry import methods_by_name\n"
        "from remix_cli.tasks.registry import task_classes\n"
        "task_classes()\n"
        "methods_by_name()\n"
        f"assert not sys.modules.keys() & {HEAVY}, sys.modules.keys() & {HEAVY}"
    )
    done = alone(code)
    assert done.returncode == 0, done.stderr


def test_a_training_loop_of_ones_own_learns_in_under_60_lines(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import own_training_loop

    losses = own_training_loop.main(steps=40)
    assert losses[-1] < losses[0] - 0.5
    text = (ROOT / "examples" / "own_training_loop.py").read_text().split('"""', 2)[2]
    assert len([line for line in text.splitlines() if line.strip()]) < 60


def test_what_the_library_offers_can_be_imported_and_costs_nothing_until_it_is():
    import remix_cli.core

    for name in remix_cli.core.__all__:
        assert getattr(remix_cli.core, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = remix_cli.core.nothing
    code = "import sys, remix_cli.core; sys.exit('torch' in sys.modules)"
    assert alone(code).returncode == 0


REGISTERED = """
from remix_cli.core.estimators.registry import ESTIMATORS, EstimatorFacts
from remix_cli.data.formats.registry import FORMATS, FormatFacts
from remix_cli.methods.registry import METHODS
from remix_cli.tasks.registry import TASKS
ESTIMATORS["moving_baseline"] = EstimatorFacts("own_estimator:MovingBaseline", "its running mean", True, 1)
FORMATS["ask_reply"] = FormatFacts("own_format:read")
METHODS["bitfit"] = "own_method:BitFit"
TASKS["terse"] = "own_task:Terse"
"""


@pytest.mark.slow
def test_worker_processes_of_a_sweep_run_what_was_added(stage, tmp_path):
    """Each is a fresh interpreter, which registers the four examples as it starts."""
    (tmp_path / "sitecustomize.py").write_text(REGISTERED)
    lines = [json.loads(line) for line in stage[1].read_text().splitlines()]
    rows = [json.dumps({"ask": row["question"], "reply": row["answer"]}) for row in lines]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    arms = {
        "an estimator": {"router.estimator": "moving_baseline"},
        "a method": {"adapter": {"method": "bitfit"}, "router": {}},
    }
    task = {"task": "terse", "source": {"path": str(stage[1]), "format": "gsm8k"}, "limit": 4}
    recipe = recipe_text(*stage[:2], tmp_path / "all", eval={"tasks": [task]})
    recipe["data"]["train"] = [{"path": str(tmp_path / "rows.jsonl"), "format": "ask_reply"}]
    recipe["train"] |= {"eval_tasks_limit": 4, "max_steps": 2}
    recipe["sweep"] = {"metric": "terse/words", "seeds": [0], "arms": arms}
    write_recipe(tmp_path / "sweep.yaml", recipe)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "examples"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "remix_cli", "sweep", str(tmp_path / "sweep.yaml"), "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["arms"]) == 2
    assert "terse/words" in done.stdout
