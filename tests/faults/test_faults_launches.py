"""Runs of several processes that are killed or stopped: rows M4 to M6 of docs/reliability.md."""

import os
import signal
import subprocess
import time

import pytest
from helpers.common import ROOT
from helpers.runs import PLAIN, launch_command, launch_environment, outcome, recipe_for
from helpers.tiny import recipe_text, write_recipe

from remix_cli.train import checkpoints

FSDP2 = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp2.yaml")]
STEPS = 40
DYING = """
import os, signal, sys
from remix_cli import cli
from remix_cli.train import trainer
step = trainer.Trainer._step
def dying(self, index):
    if index == 3 and os.environ["RANK"] == "1" and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, index)
trainer.Trainer._step = dying
cli.main()
"""


def begin(how, program, recipe, *arguments) -> subprocess.Popen:
    """`remix train` by two processes, in a process group of their own with what launches them."""
    command = launch_command([*program, "train", str(recipe), *arguments], 2, how)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=launch_environment(),
    )


def ended_within_a_minute(process: subprocess.Popen, since: float) -> str:
    said, _ = process.communicate(timeout=120)
    assert time.monotonic() - since < 60, said
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, 0)
    return said


def test_M4_when_one_of_two_processes_dies_both_end_and_nothing_half_done_is_published(stage, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    begun = time.monotonic()
    process = begin(PLAIN, [str(tmp_path / "dying.py")], recipe)
    ended_within_a_minute(process, begun)
    assert process.returncode != 0
    assert not (tmp_path / "out" / "adapter").exists()
    assert checkpoints.newest_valid(tmp_path / "out" / "checkpoints")[0].name == "step-000002"


@pytest.mark.slow
@pytest.mark.parametrize("how", [PLAIN, FSDP2], ids=["whole", "sharded"])
def test_M5_a_run_of_two_that_was_killed_between_checkpoints_ends_with_the_same_bits(stage, tmp_path, how):
    (tmp_path / "dying.py").write_text(DYING)
    unbroken = ["-m", "remix_cli"]
    for name, program in (("broken", [str(tmp_path / "dying.py")]), ("whole", unbroken)):
        recipe_for(stage, tmp_path / name, train={"max_steps": 6, "save_steps": 2, "logging_steps": 1, "eval_steps": 2})
        begin(how, program, tmp_path / f"{name}.yaml").communicate(timeout=120)
    assert not (tmp_path / "broken" / "adapter").exists()
    process = begin(how, unbroken, tmp_path / "broken.yaml", "--resume")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_M6_a_scheduler_that_ends_all_processes_leaves_a_checkpoint_that_goes_on(stage, tmp_path):
    """Sharded, where a process that ends earlier than the others would leave them waiting for its layers."""
    many = {"train": {"max_steps": STEPS, "num_train_epochs": 99, "logging_steps": 1, "save_steps": STEPS}}
    for name in ("broken", "whole"):
        recipe_for(stage, tmp_path / name, **many)
    whole = begin(FSDP2, ["-m", "remix_cli"], tmp_path / "whole.yaml")
    said, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, said
    process = begin(FSDP2, ["-m", "remix_cli"], tmp_path / "broken.yaml")
    metrics = tmp_path / "broken" / "metrics.jsonl"
    while process.poll() is None and (not metrics.is_file() or metrics.read_text().count("\n") < 10):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    said = ended_within_a_minute(process, time.monotonic())
    newest, _ = checkpoints.newest_valid(tmp_path / "broken" / "checkpoints")
    step = checkpoints.step_of(newest)
    assert step < STEPS
    assert said.count(f"interrupted after step {step}; go on with") == 1, said
    again = begin(FSDP2, ["-m", "remix_cli"], tmp_path / "broken.yaml", "--resume")
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    a, b = (tmp_path / name / "adapter" / "adapter.safetensors" for name in ("broken", "whole"))
    assert a.read_bytes() == b.read_bytes()
