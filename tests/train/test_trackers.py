"""Every tracker holds what metrics.jsonl holds, once, however often the run was stopped."""

import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from helpers.common import ROOT
from helpers.runs import CLOCK, launch, recipe_for, run
from helpers.tiny import recipe_text, write_recipe
from helpers.trackers import READERS, logged, points_of

from remix_cli.recipe.schema import TRACKERS
from remix_cli.train.record import Recorder
from remix_cli.train.tracker_tools import TOOLS, TensorBoard, Tool

INSTALLED = [tool for tool in READERS if find_spec(tool)]
LIGHT = [tool for tool in ("tensorboard", "trackio") if tool in INSTALLED]
KILLED = """
import os, signal, sys
from remix_cli.cli import main
from remix_cli.train.record import Recorder
ends, add = Recorder.step_ends, Recorder.add
def note(self, record):
    self.done = record["step"]
    add(self, record)
def kill(self):
    ends(self)
    if self.done == 5: os.kill(os.getpid(), signal.SIGKILL)
Recorder.add, Recorder.step_ends = note, kill
sys.argv = ["remix", "train", sys.argv[1]]
main()
"""


@pytest.fixture(autouse=True)
def _off_line(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


def followed(stage, folder, *tools, **train):
    return recipe_for(
        stage, folder, train={"report_to": list(tools), "max_steps": 6, "eval_steps": 2, "save_steps": 4} | train
    )


def as_kept(points):
    """In single precision, which is what TensorBoard keeps; clocks aside, for a step may have been made twice."""
    return [(key, step, pytest.approx(value, rel=1e-6)) for key, step, value in points if key not in CLOCK]


def check(folder, tools):
    wanted = as_kept(logged(folder))
    for tool in tools:
        assert [point for point in points_of(tool, folder) if point[0] not in CLOCK] == wanted, tool


class Stopped(Exception):
    pass


@contextmanager
def stop_after(monkeypatch, step):
    """The next run ends like one that is killed once `step` has been written and sent."""
    add, ends = Recorder.add, Recorder.step_ends

    def note(self, record):
        self.done = record["step"]
        add(self, record)

    def stop(self):
        ends(self)
        if getattr(self, "done", 0) == step:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "add", note)
        patch.setattr(Recorder, "step_ends", stop)
        yield


def test_the_schema_names_the_tools_and_accelerate_has_them():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert list(TOOLS) == list(TRACKERS) == list(READERS)
    assert TOOLS.keys() <= LOGGER_TYPE_TO_CLASS.keys()


def test_trackers_hold_what_metrics_hold_and_pictures_of_the_routing(stage, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(followed(stage, tmp_path / "run", *LIGHT))
    check(tmp_path / "run", LIGHT)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    assert [image.step for image in read.Images("routing")] == [2, 4, 6]


@pytest.mark.parametrize("step", [0, 5])
def test_what_a_tracker_holds_beyond_the_checkpoint_is_not_sent_again(stage, monkeypatch, tmp_path, step):
    recipe = followed(stage, tmp_path / "run", *LIGHT)
    with stop_after(monkeypatch, step), pytest.raises(Stopped):
        run(recipe)
    assert any(point[1] == step for point in points_of(LIGHT[-1], tmp_path / "run"))
    run(recipe, resume=True)
    check(tmp_path / "run", LIGHT)


def test_what_a_tracker_lost_is_sent_from_the_metrics(stage, monkeypatch, tmp_path):
    tool = LIGHT[-1]
    log = TOOLS[tool].log
    recipe = followed(stage, tmp_path / "run", tool)
    with stop_after(monkeypatch, 5), monkeypatch.context() as patch:
        patch.setattr(TOOLS[tool], "log", lambda self, step, row: log(self, step, row) if step < 2 else None)
        with pytest.raises(Stopped):
            run(recipe)
    run(recipe, resume=True)
    check(tmp_path / "run", [tool])


def test_a_tracker_that_is_named_later_is_told_the_whole_run(stage, monkeypatch, tmp_path):
    with stop_after(monkeypatch, 5), pytest.raises(Stopped):
        run(followed(stage, tmp_path / "run", report_to="none"))
    run(followed(stage, tmp_path / "run", *LIGHT), resume=True)
    check(tmp_path / "run", LIGHT)


def test_a_signal_before_an_evaluation_leaves_the_step_to_the_resumed_run(stage, monkeypatch, tmp_path):
    from remix_cli.errors import Interrupted
    from remix_cli.train.trainer import Trainer

    step_of = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, step: step_of(self, step) or step == 3)
    recipe = followed(stage, tmp_path / "run", *LIGHT)
    with pytest.raises(Interrupted):
        run(recipe)
    monkeypatch.undo()
    run(recipe, resume=True)
    check(tmp_path / "run", LIGHT)


def test_a_tracker_that_breaks_off_is_told_and_training_goes_on(stage, monkeypatch, tmp_path, verb):
    def gone(self, step, row):
        raise ConnectionError("the server\nis away")

    monkeypatch.setattr(TensorBoard, "log", gone)
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "run", train={"report_to": "tensorboard"})
    out, _ = verb("train", write_recipe(tmp_path / "r.yaml", recipe))
    assert out.count("tensorboard: the server is away; training goes on without it") == 1
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_tracker_that_cannot_be_opened_is_an_error_that_leaves_nothing(stage, monkeypatch, tmp_path, verb):
    def refuse(self):
        raise ValueError("no key\nwas given")

    monkeypatch.setattr(Tool, "opened", refuse)
    monkeypatch.setattr(TensorBoard, "opened", refuse)
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "run", train={"report_to": ["tensorboard"]})
    path = write_recipe(tmp_path / "r.yaml", recipe)
    _, err = verb("train", path, expect=2)
    assert err == "error: train.report_to: tensorboard: no key was given\n"
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_told_with_what_installs_it(stage, monkeypatch, tmp_path, verb):
    monkeypatch.setattr(TOOLS["mlflow"], "module", "no_such_package")
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "run", train={"report_to": ["tensorboard", "mlflow"]})
    _, err = verb("train", write_recipe(tmp_path / "r.yaml", recipe), expect=2)
    assert err == "error: train.report_to: mlflow is not installed; pip install mlflow\n"


@pytest.mark.parametrize("value", ["tensorbord", [], ["none"], ["wandb", "wandb"], ["none", "wandb"], 3, [3]])
def test_what_is_no_tracker_is_one_problem(stage, tmp_path, verb, value):
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "run", train={"report_to": value})
    _, err = verb("train", write_recipe(tmp_path / "r.yaml", recipe), expect=2)
    assert "train.report_to: should be none, or one or more of tensorboard, wandb" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_every_tracker_at_once_holds_what_metrics_hold_though_the_run_is_killed(stage, tmp_path):
    """Killed after step 5, gone on from step 4."""
    followed(stage, tmp_path / "run", *INSTALLED)
    recipe = str(tmp_path / "run.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in (["-c", KILLED, recipe], ["-m", "remix_cli", "train", recipe, "--resume"]):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300, check=False
        )
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run", INSTALLED)


@pytest.mark.slow
def test_of_two_processes_one_tells_the_trackers(stage, tmp_path):
    followed(stage, tmp_path / "run", *LIGHT)
    launch([], tmp_path / "run.yaml", 2)
    check(tmp_path / "run", LIGHT)
