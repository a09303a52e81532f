"""What a run writes down besides its weights: metrics.jsonl, a tracker if asked for, summary.json."""

import json
import os
import platform
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

import remix_cli
from remix_cli.core.description import read_description
from remix_cli.core.estimators.registry import ESTIMATORS
from remix_cli.diagnostics.parameters import ParameterCounts
from remix_cli.errors import ArtefactError, StorageError
from remix_cli.recipe import Recipe
from remix_cli.runs import RunFolder
from remix_cli.storage import write_text
from remix_cli.train.checkpoints import TrainingState


class Recorder:
    """Appends to metrics.jsonl; used by the main process only."""

    def __init__(self, recipe: Recipe, folder: RunFolder, step: int, evaluation_due: bool):
        """Go on after `step`, or in front of its evaluation: what a resumed run will do again is forgotten."""
        self.folder = folder
        self._rewind(step, evaluation_due)
        self.tracker: Any = None
        if recipe.train.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tracker = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1 if step else None)

    def add(self, record: dict[str, Any]) -> None:
        """Raises StorageError."""
        try:
            with self.folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.folder.metrics}: {error.strerror}") from error
        if self.tracker:
            for key, value in record.items():
                if isinstance(value, int | float) and key != "step":
                    self.tracker.add_scalar(key, value, record["step"])

    def _rewind(self, step: int, evaluation_due: bool) -> None:
        """Drop records after `step`, and a line cut off by a crash.

        The records of `step` itself were written before its checkpoint; with no checkpoint all go.
        """
        if self.folder.metrics.exists():
            lines = read_lines(self.folder.metrics)
            kept = [line for line in lines if step > 0 and (step_of(line) or 0) <= step]
            if evaluation_due:
                kept = [line for line in kept if not (step_of(line) == step and "eval_loss" in json.loads(line))]
            write_text(self.folder.metrics, "".join(line + "\n" for line in kept))

    def close(self) -> None:
        if self.tracker:
            self.tracker.close()


def read_lines(metrics: Path) -> list[str]:
    """The records of metrics.jsonl, none if there is no such file, without a last line that a crash cut off.

    Raises ArtefactError if anything else in it is no record.
    """
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines() if os.path.lexists(metrics) else []
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{metrics}: cannot be read ({error}); move it away to go on without it") from None
    bad = next((i for i, line in enumerate(lines) if step_of(line) is None), None)
    if bad is not None and bad < len(lines) - 1:
        raise ArtefactError(f"{metrics}:{bad + 1}: damaged; move the file away to go on without it")
    return lines[:bad]


def step_of(line: str) -> int | None:
    """The step of a record; None if the line is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def summarise(
    recipe: Recipe, state: TrainingState, counts: ParameterCounts, device: torch.device, processes: int
) -> dict[str, Any]:
    """What summary.json holds."""
    estimator = ESTIMATORS[recipe.router.estimator]
    trains = recipe.adapter_config().samples and not recipe.router.fixed
    return {
        "method": recipe.adapter.method,
        "steps": state.step,
        "best_eval_loss": state.best_loss,
        "best_step": state.best_step,
        "seconds": round(state.seconds, 3),
        "tokens": state.tokens,
        "parameters": counts.to_dict(),
        "estimator": {"name": recipe.router.estimator, "unbiased": estimator.unbiased} if trains else None,
        "peak_memory_gib": round(peak_memory(device), 3),
        "processes": processes,
        "device": _device_name(device),
        "versions": {
            "remix": remix_cli.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def weights_of(folder: RunFolder) -> dict[str, str]:
    """Hashes of the adapters that the run ends with, by which others in their place are known, damaged ones aside."""
    found = {}
    for place in (folder.adapter, folder.best):
        with suppress(ArtefactError):
            found[place.name] = read_description(place).weights_sha256
    return found


def peak_memory(device: torch.device) -> float:
    """GiB: what the allocator held at most on a GPU, the process's resident maximum on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
