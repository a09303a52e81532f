"""`--format peft-merged` and `--format merged`: one LoRA in place of the pool, by itself or in the weights.

Both are approximations of a routed model, and say what they cost: nearest_lora.py fits, and prices on held-out rows.
For one selection of a run that routes by sequence they are exact (selected.py), and so is merging what is one LoRA.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoModelForCausalLM

from remix_cli.compat.transformers import quiet
from remix_cli.core.residual import ResidualLinear
from remix_cli.data.batches import Batch, collate
from remix_cli.data.rows import Rows
from remix_cli.data.splits import evenly, training_examples
from remix_cli.errors import ArtefactError, DataError, RecipeError
from remix_cli.export.card import card
from remix_cli.export.hf import SHARD, base_state, check_pool
from remix_cli.export.nearest_lora import Merged, applied, merge_pool, price
from remix_cli.export.peft_experts import write_peft_lora
from remix_cli.export.readback import check_logits, logits_differ, probe
from remix_cli.export.selected import Selection, check_sequence_level, merge_selection
from remix_cli.runs import LoadedRun
from remix_cli.storage import publish_folder, write_json

BATCH = 8


def export_merged(run: LoadedRun, target: Path, *, into_weights: bool, rank: int | None, rows: int) -> dict[str, float]:
    """Write the folder, whole or not at all; what the approximation costs, on held-out rows.

    The LoRA has rank `rank` (None: k r) and is calibrated on `rows` training rows. Raises RecipeError, DataError,
    ArtefactError if the folder read back is not the model that was fitted, StorageError.
    """
    config = run.stored.config
    check_pool(run, "merged" if into_weights else "peft-merged")
    largest = config.pool_size * config.rank
    rank = rank or min(largest, config.active * config.rank)
    if rank > largest:
        raise RecipeError(f"--rank: {rank} is more than the pool itself has (n r = {largest})")
    train, held_out = _batches(run, rows)
    kind, whole = "merged" if into_weights else "peft-merged", "routed"
    if not config.routed:
        kind, whole = "merged-paths", "trained"
    with run.adapter.unchanging():
        merged = merge_pool(run.model, run.adapter, train, rank)
        cost = price(run.model, run.adapter, merged, held_out, whole)
    _publish(run, target, merged, kind, rank, cost)
    return cost


def is_one_lora(run: LoadedRun) -> bool:
    """Is there for each linear a LoRA, perhaps of a higher rank, that is exactly what it adds?"""
    linears = run.adapter.linears.values()
    joined = any(isinstance(linear, ResidualLinear) and linear.kind != "block" for linear in linears)
    return bool(linears) and not run.adapter.routers and not joined


def export_one_lora(run: LoadedRun, target: Path) -> None:
    """Write a run of one LoRA merged into the weights, exactly. Raises as above."""
    check_pool(run, "merged")
    scale = run.stored.config.scale
    merged = {
        name: Merged(linear.reading().detach(), linear.outer().detach() * scale)
        for name, linear in run.adapter.linears.items()
    }
    _publish(run, target, merged, "merged-exactly", run.stored.config.rank, {})


def export_selection(run: LoadedRun, target: Path, selection: Selection, *, into_weights: bool) -> None:
    """Write one selection of a run that routes by sequence, exactly; with `selection.json`. Raises as above."""
    check_pool(run, "merged" if into_weights else "peft-merged")
    check_sequence_level(run)
    rank = run.stored.config.active * run.stored.config.rank
    kind = "selected" if into_weights else "peft-selected"
    _publish(run, target, merge_selection(run, selection), kind, rank, {}, selection)


def _publish(
    run: LoadedRun,
    target: Path,
    merged: dict[str, Merged],
    kind: str,
    rank: int,
    cost: dict[str, float],
    selection: Selection | None = None,
) -> None:
    into_weights = not kind.startswith("peft")
    with publish_folder(target) as scratch:
        if into_weights:
            _write_merged(run, scratch, merged)
        else:
            _write_lora(run, scratch, merged, rank)
        (scratch / "README.md").write_text(card(run, kind, cost), encoding="utf-8")
        if selection is not None:
            write_json(scratch / "selection.json", selection)
        if into_weights:
            _check(run, scratch, merged)


def _batches(run: LoadedRun, rows: int) -> tuple[list[Batch], list[Batch]]:
    """(calibration, held-out) batches of the run's own rows. Raises DataError."""
    to_price = run.encoder.encode_rows(evenly(run.held_out_examples(), rows)).rows
    to_fit = run.encoder.encode_rows(training_examples(run.recipe, rows)).rows
    if not to_fit or not to_price:
        raise DataError("export needs the run's training and held-out rows, to fit the merged LoRA and to price it")
    return _collated(to_fit, run), _collated(to_price, run)


def _collated(rows: Rows, run: LoadedRun) -> list[Batch]:
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    return [collate(by_length[i : i + BATCH]).to(run.device) for i in range(0, len(rows), BATCH)]


def _write_lora(run: LoadedRun, folder: Path, merged: dict[str, Merged], rank: int) -> None:
    parts = {name: (part.down, part.up) for name, part in merged.items()}
    write_peft_lora(folder, parts, run.stored.identity.base_model, rank, alpha=rank)
    run.tokenizer.save_pretrained(folder)


def _write_merged(run: LoadedRun, folder: Path, merged: dict[str, Merged]) -> None:
    state = base_state(run)
    for name, part in merged.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight.float() + part.up @ part.down).to(weight.dtype)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ArtefactError(
                f"{name} does not fit into {run.recipe.model.dtype} once merged; use model.dtype float32"
            )
    save_torch_state_dict(state, folder, max_shard_size=SHARD)
    config: Any = run.model.config
    config.save_pretrained(folder)
    run.model.generation_config.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _check(run: LoadedRun, folder: Path, merged: dict[str, Merged]) -> None:
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=next(run.model.parameters()).dtype)
    loaded.to(run.device)
    ids = probe(run)
    with applied(run.adapter, merged):
        ours = run.model(input_ids=ids, use_cache=False).logits
    difference = logits_differ(ours, loaded(input_ids=ids, use_cache=False).logits)
    # the weights themselves are rounded once more
    check_logits(difference, loaded.dtype, "the merged model read back does not agree with the fit", rounding=3e-2)
