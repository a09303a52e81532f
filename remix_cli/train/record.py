"""What a run writes down besides its weights: metrics.jsonl, the same for trackers, summary.json."""

import json
import os
import platform
import resource
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import remix_cli
from remix_cli.core.description import read_description
from remix_cli.core.estimators.registry import ESTIMATORS
from remix_cli.diagnostics.parameters import ParameterCounts
from remix_cli.diagnostics.plots import picture_of_use
from remix_cli.errors import ArtefactError, StorageError
from remix_cli.recipe import Recipe
from remix_cli.runs import RunFolder
from remix_cli.storage import write_text
from remix_cli.train.checkpoints import TrainingState
from remix_cli.train.stopping import has_waited_enough
from remix_cli.train.trackers import Trackers


class Recorder:
    """Context manager that appends to metrics.jsonl and tells the trackers; used by the main process only."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, step: int, evaluation_due: bool, tell: Callable[[str], None] = print
    ):
        """Go on after `step`, or in front of its evaluation: what a resumed run will do again is forgotten.

        Raises StorageError, ArtefactError, RecipeError if a tracker cannot be opened.
        """
        self.folder = folder
        kept = self._rewind(step, evaluation_due)
        self.trackers = Trackers(recipe, folder, kept, step, tell)
        if not evaluation_due:
            self.trackers.send()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: Any) -> None:
        self.trackers.close()

    def add(self, record: dict[str, Any]) -> None:
        """Raises StorageError."""
        try:
            with self.folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.folder.metrics}: {error.strerror}") from error
        self.trackers.add(record)

    def step_ends(self) -> None:
        """Nothing more is recorded of it."""
        self.trackers.send()

    def picture(self, step: int, routers: list[str], shares: Tensor) -> None:
        """What each LoRA (L routers, n) served in a step, for the trackers, where it can be drawn."""
        if self.trackers.tools and find_spec("matplotlib"):
            self.trackers.picture(step, "routing", picture_of_use(routers, shares.tolist()))

    def _rewind(self, step: int, evaluation_due: bool) -> list[dict[str, Any]]:
        """Drop records after `step`, and a line cut off by a crash; those that are left.

        The records of `step` itself were written before its checkpoint; with no checkpoint all go.
        """
        if not self.folder.metrics.exists():
            return []
        lines = read_lines(self.folder.metrics)
        kept = [line for line in lines if step > 0 and (step_of(line) or 0) <= step]
        if evaluation_due:
            kept = [line for line in kept if not (step_of(line) == step and "eval_loss" in json.loads(line))]
        write_text(self.folder.metrics, "".join(line + "\n" for line in kept))
        return [json.loads(line) for line in kept]


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
    values = {
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
    if state.begun_from:
        values["begun_from"] = state.begun_from
    if has_waited_enough(recipe, state):
        values["stopped_early"] = True
    return values


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
