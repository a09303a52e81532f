"""Training runs: in this process, in one of their own, in several; and what a run is judged by."""

import json
import os
import subprocess
import sys

import yaml
from rich.console import Console

from helpers.tiny import recipe_text, write_recipe
from remix_cli.recipe import load_recipe
from remix_cli.train import checkpoints, trainer

CLOCK = {"tokens_per_second", "step_seconds", "peak_memory_gib"}
STEPS = 6
TRAIN = {
    "max_steps": STEPS,
    "num_train_epochs": 9,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "learning_rate": 0.02,
    "logging_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
}


def recipe_for(stage, output, **groups):
    """Dropout, shuffling, accumulation, M = 2 and more than one epoch, so that nothing exact is exact by luck."""
    model, rows, _ = stage
    settings = {"train": TRAIN, "adapter": {"dropout": 0.2}, "router": {"estimator": "control_variate"}} | groups
    recipe = recipe_text(model, rows, output, **settings)
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path)


def run(recipe, **options):
    return trainer.train(recipe, Console(quiet=True), **options)


def outcome(folder):
    """Everything a run is judged by, clocks aside."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{k: v for k, v in m.items() if k not in CLOCK} for m in metrics],
        "checkpoints": len(checkpoints.list_checkpoints(folder / "checkpoints")),  # pruned to as many
        "adapter": (folder / "adapter" / "adapter.safetensors").read_bytes(),
        "best": (folder / "best" / "adapter.safetensors").read_bytes(),
        "optimizer": (folder / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors").read_bytes(),
    }


def small(stage, tmp_path, **groups):
    model, rows, _ = stage
    return load_recipe(write_recipe(tmp_path / "r.yaml", recipe_text(model, rows, tmp_path / "out", **groups)))


def start_cli(recipe, *arguments):
    command = [sys.executable, "-m", "remix_cli", "train", str(recipe), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=recipe.parent)


PLAIN = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def launch_command(program, processes, how=PLAIN):
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", str(processes)]
    return [*command, "--main_process_port", "0", *program]


def launch_environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def launch(arguments, target, processes, how=PLAIN, verb="train"):
    """`remix train` of a recipe, or another verb of a run, by several processes.

    Accelerate starts them with its GPU launcher only; ACCELERATE_USE_CPU puts them on gloo.
    """
    command = launch_command(["-m", "remix_cli", verb, str(target), *arguments], processes, how)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=launch_environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
