"""Exact merging of a sequence-level run for one prompt: the k LoRAs that each router picks for it, at omega each.

With `router.level: sequence` a prompt fixes one selection per router for the whole answer, so the model that answers
this prompt is W + omega sum_{i in I} B_i A_i: an ordinary checkpoint, or one LoRA of rank k r.
"""

import json
from pathlib import Path
from typing import Any

import torch

from remix_cli.core.trace import Trace
from remix_cli.errors import RecipeError
from remix_cli.export.nearest_lora import Merged
from remix_cli.runs import LoadedRun

Selection = dict[str, list[int]]  # router -> ids of its k LoRAs


def check_sequence_level(run: LoadedRun) -> None:
    """Raises RecipeError."""
    if run.stored.config.level != "sequence":
        raise RecipeError(
            "--prompt and --selection: this run routes token by token, so no selection holds for a whole sequence; "
            "leave them out for the nearest LoRA, or train with router.level=sequence"
        )


@torch.no_grad()
def selection_for(run: LoadedRun, prompt: str) -> Selection:
    """What the routers choose for `prompt` as a user's turn."""
    ids = torch.tensor([run.encoder.question_ids(prompt)], device=run.device)
    with run.adapter.tracing(Trace(prompt=torch.ones_like(ids, dtype=torch.bool))) as trace:
        run.model(input_ids=ids, use_cache=False)
    return {name: sorted(decision.chosen[0, 0].tolist()) for name, decision in trace.decisions.items()}


def read_selection(run: LoadedRun, path: Path) -> Selection:
    """A file that an earlier export left: {router: [k ids]}. Raises RecipeError."""
    config = run.stored.config
    try:
        selection = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--selection: {path}: cannot be read ({error})") from None
    if not _fits(selection, run):
        raise RecipeError(
            f"--selection: {path}: must name each of the {len(run.adapter.routers)} routers with {config.active} "
            f"different ids from 0 to {config.pool_size - 1}, as selection.json of an export with --prompt does"
        )
    return selection


def _fits(selection: Any, run: LoadedRun) -> bool:
    """Does the document name k different LoRAs for each of the run's routers?"""
    config = run.stored.config
    if not isinstance(selection, dict) or set(selection) != set(run.adapter.routers):
        return False
    for ids in selection.values():
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < config.pool_size for i in ids):
            return False
        if len(ids) != config.active or len(set(ids)) != config.active:
            return False
    return True


@torch.no_grad()
def merge_selection(run: LoadedRun, selection: Selection) -> dict[str, Merged]:
    """One LoRA of rank k r for each adapted layer, exactly the chosen ones."""
    merged = {}
    for name, linear in run.adapter.linears.items():
        assert linear.router is not None
        chosen = torch.tensor(selection[linear.router.name], device=run.device)  # (k,)
        first = chosen * linear.rank  # of each LoRA's rows
        rows = (first[:, None] + torch.arange(linear.rank, device=run.device)).flatten()  # (k r,)
        up = linear.lora_B.detach()[:, rows] * run.stored.config.scale
        merged[name] = Merged(linear.lora_A.detach()[rows], up)
    return merged
