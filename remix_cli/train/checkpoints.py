"""Durable training state: `checkpoints/step-NNNNNN/`, published by a rename, its manifest written last.

Nothing random is saved because nothing needs to be: data order and draws are functions of (seed, step).
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from remix_cli.core.patch import Adapter
from remix_cli.core.store import BaseIdentity, TrainedOn, load_stored, save_adapter
from remix_cli.errors import ArtefactError
from remix_cli.storage import is_sealed, publish_folder, remove, seal, sha256, storage_errors, write_json

FORMAT = 3
UNSEALED = 2  # the last format whose manifest has no hash of itself
OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass
class TrainingState:
    """Everything besides adapter and optimizer that a later step depends on."""

    step: int = 0  # optimizer steps done
    best_loss: float | None = None  # held-out loss of the best adapter so far
    best_cost: float | None = None  # and what made it the best, less being better
    best_step: int | None = None
    coefficient: dict[str, float] = field(default_factory=dict)  # the estimator's own state
    evaluation_due: bool = False  # the run was stopped before this step's held-out loss was known
    seconds: float = 0.0  # training time so far
    tokens: int = 0
    to_better: float | None = None  # early stopping: the least cost at a regular measurement so far
    waited: int = 0  # and how many of them in a row did not better it
    begun_from: list[dict[str, str]] = field(default_factory=list)  # what the adapter began with; see begin.py

    def to_dict(self) -> dict[str, Any]:
        """Younger fields are left out where they say nothing, so that a run without them writes what it did before."""
        values = asdict(self)
        for name, nothing in (("to_better", None), ("waited", 0), ("begun_from", [])):
            if values[name] == nothing:
                del values[name]
        return values


@dataclass(frozen=True)
class Origin:
    """What a checkpoint belongs to; a resumed run must agree. Hashes."""

    recipe: str
    data: str  # of the encoded training rows
    base: str  # fingerprint of the base model
    tokenizer: str
    rows_per_step: int  # as the run was begun, whatever the number of processes that go on with it
    held_out: str | None = None  # of the encoded held-out rows; earlier versions did not say


@dataclass(frozen=True)
class Machine:
    """What equal bits depend on besides; a resumed run that differs goes on, but says so."""

    torch_version: str
    threads: int
    device: str
    processes: int = 1  # they cut a step into other micro-batches, which round otherwise

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        processes = dist.get_world_size() if dist.is_initialized() else 1
        return cls(torch.__version__, torch.get_num_threads(), device.type, processes)


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    identity: BaseIdentity,
    origin: Origin,
    trained_on: TrainedOn,
    keep: int,
) -> Path:
    """Publish a checkpoint for `state.step` and only then remove the oldest beyond `keep`. Raises StorageError."""
    target = folder / f"step-{state.step:06d}"
    device = next(iter(adapter.parameters().values())).device
    moments = save(_flatten(optimizer, adapter), metadata={"format": "pt"})
    with publish_folder(target, len(moments) + adapter_bytes(adapter), replace=True) as scratch:
        save_adapter(scratch, adapter, identity, trained_on)
        (scratch / OPTIMIZER_FILE).write_bytes(moments)
        write_json(scratch / "state.json", state.to_dict())
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(scratch.iterdir())}
        made = {"origin": asdict(origin), "machine": asdict(Machine.here(device))}
        manifest = {"format": FORMAT, "step": state.step, "files": files} | made
        write_json(scratch / "manifest.json", seal(manifest))
    prune(folder, state.step, keep)
    return target


def prune(folder: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to `step`, the one just written. Raises StorageError.

    Later ones are those that were found damaged when the run was resumed.
    """
    found = list_checkpoints(folder)
    behind = [c for c in found if step_of(c) <= step]
    for old in [*behind[:-keep], *found[len(behind) :]]:
        with storage_errors(old):
            remove(old)


def adapter_bytes(adapter: Adapter) -> int:
    """Size of the adapter's weights on disk; a checkpoint holds them and AdamW's two moments, three times as much."""
    return sum(4 * p.numel() for p in adapter.tensors().values())


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch("step-[0-9]+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in one line; None if its manifest holds."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] not in (FORMAT, UNSEALED):
            return f"format {manifest['format']}, this version reads {UNSEALED} and {FORMAT}"
        if not is_sealed(manifest) and (manifest["format"] == FORMAT or "sha256" in manifest):
            return "manifest.json is damaged (its sha256 differs from what it says of itself)"
        if manifest["step"] != step_of(checkpoint):
            return f"made at step {manifest['step']}, so the folder was renamed"
        Origin(**manifest["origin"])
        Machine(**manifest["machine"])
        for name, expected in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError:
        return "no manifest.json"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        return f"manifest.json is damaged ({error})"
    return None


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose manifest verifies, and a line for each damaged one skipped.

    Raises ArtefactError if there are checkpoints but none is valid: never a silent fresh start.
    """
    skipped: list[str] = []
    checkpoints = list_checkpoints(folder)
    for checkpoint in reversed(checkpoints):
        problem = verify(checkpoint)
        if problem is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint}: {problem}")
    if checkpoints:
        raise ArtefactError(*skipped, f"{folder}: no valid checkpoint; start again with --overwrite")
    return None, skipped


def origin_of_last(folder: Path) -> Origin | None:
    """What the newest checkpoint that can be read belongs to; None if there is none."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return Origin(**json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["origin"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


CAUSES = {
    "recipe": "another recipe",
    "data": "other rows",
    "base": "another base model",
    "tokenizer": "another tokenizer",
    "rows_per_step": "another number of rows a step",
    "held_out": "other held-out rows",
}


def restore(
    checkpoint: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, origin: Origin, identity: BaseIdentity
) -> tuple[TrainingState, list[str]]:
    """Load a verified checkpoint into adapter and optimizer; the state, and what forbids equal bits, one line each.

    Raises ArtefactError if it was made from another recipe, data, base model or tokenizer than `origin` and `identity`.
    """
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    made = manifest["origin"]
    changed = [CAUSES[name] for name, value in asdict(origin).items() if name in made and made[name] != value]
    if changed == [CAUSES["recipe"]]:  # and the run's recipe.yaml, which has been compared, says what this one says
        raise ArtefactError(
            f"{checkpoint}: begun under an earlier version of remix, whose recipes meant something else, or the run's "
            "recipe.yaml was changed; go on with that version, put the file back, or start a new output_dir"
        )
    stored = load_stored(checkpoint)
    changed = changed or [f"another {what}" for what in stored.identity.differences(identity)]
    if changed:
        raise ArtefactError(
            f"{checkpoint}: made from {' and '.join(changed)} than this run would use; restore what it was begun "
            "with, or start a new output_dir"
        )
    here = asdict(Machine.here(next(iter(adapter.parameters().values())).device))
    different = [f"{name} was {was}, is {here[name]}" for name, was in manifest["machine"].items() if here[name] != was]
    try:
        adapter.load(stored.tensors)
        _unflatten(load_file(checkpoint / OPTIMIZER_FILE), optimizer, adapter)
        return TrainingState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))), different
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtefactError(f"{checkpoint}: does not fit this run ({error})") from None


def _flatten(optimizer: torch.optim.Optimizer, adapter: Adapter) -> dict[str, Tensor]:
    """Optimizer state as `<parameter>/<quantity>` tensors."""
    named = adapter.parameters()
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in named.items()
        for key, value in optimizer.state[parameter].items()
    }


def _unflatten(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, adapter: Adapter) -> None:
    named = adapter.parameters()
    by_parameter: dict[str, dict[str, Any]] = {name: {} for name in named}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        device = named[name].device
        by_parameter[name][quantity] = value.to(device) if value.dim() or device.type != "cpu" else value
    for name, parameter in named.items():
        optimizer.state[parameter] = by_parameter[name]
