"""What can be refused before any weight is loaded and anything is written."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remix_cli.core.patch import Adapter, TargetError, find_targets
from remix_cli.core.router import ONE_LIST
from remix_cli.core.trace import Trace
from remix_cli.data.sources import check_source
from remix_cli.errors import RecipeError, StorageError, shortened
from remix_cli.methods.apply import apply_method
from remix_cli.methods.registry import method_named
from remix_cli.models import input_ranks, longest_input, meta_ids, rehearsing, skeleton
from remix_cli.recipe import Recipe
from remix_cli.runs import RunFolder
from remix_cli.storage import MIB, free_bytes, remove, storage_errors
from remix_cli.tasks.registry import task_class
from remix_cli.train import begin
from remix_cli.train.checkpoints import adapter_bytes
from remix_cli.train.tracker_tools import missing_packages


def check_recipe(recipe: Recipe, *, begins: bool = True) -> Adapter:
    """Problems beyond the schema, found without loading weights or rows; all of them at once.

    `begins`: False for a run that goes on from a checkpoint, and needs `adapter.init_from` no more. Returns the adapter
    on a model skeleton (no memory for weights), for names and counts.
    Raises RecipeError.
    """
    problems = []
    problems += missing_packages(recipe.train.trackers)
    places = [("data.train", recipe.data.train), ("data.validation", recipe.data.validation)]
    for key, sources in places:
        for i, source in enumerate(sources):
            problems += check_source(source, f"{key}.{i}")
    for i, task in enumerate(recipe.eval.tasks):
        if task.source is not None:
            problems += check_source(task.source, f"eval.tasks.{i}.source")
        if task.shots_from is not None:
            problems += check_source(task.shots_from, f"eval.tasks.{i}.shots_from")
    try:
        model = skeleton(recipe.model)
        limit = longest_input(model)
        front = recipe.virtual_tokens
        if limit is not None and recipe.data.max_length + front > limit:
            also = f" and {front} virtual tokens" if front else ""
            problems.append(
                f"data.max_length: {recipe.data.max_length}{also}, but the model reads at most {limit} tokens"
            )
        for i in range(len(recipe.eval.tasks)):
            problems += _check_answers(recipe, i, limit)
        ranks = input_ranks(model)
        config = recipe.adapter_config()
        targets = find_targets(model, config.target_modules) if _has_targets(config.method) else []
        adapter = apply_method(model, config, seed=recipe.seed)
        problems += _check_inputs(adapter, targets, ranks) or _check_pass(adapter)
        if begins:
            problems += begin.check(recipe, adapter)
    except RecipeError as error:
        problems += error.problems
    except TargetError as error:
        problems.append(f"adapter.target_modules: {error}")
    if problems:
        raise RecipeError(*problems)
    if not recipe.adapter.train_loras:
        adapter.freeze_loras()
    return adapter


def _check_answers(recipe: Recipe, i: int, limit: int | None) -> list[str]:
    """Problems with the answers to task `i` at `limit` positions, whatever its prompts: those count when it is read."""
    task = recipe.eval.tasks[i]
    kind = task_class(task.task)
    if limit is None or not kind.generates:
        return []
    new, front = task.max_new_tokens or kind.max_new_tokens, recipe.virtual_tokens
    if front + 1 + new <= limit:
        return []
    also = f" and {front} virtual tokens" if front else ""
    return [
        f"eval.tasks.{i}.max_new_tokens: {new} after a prompt{also}, but the model reads at most {limit} "
        "tokens; lower it"
    ]


def _check_inputs(adapter: Adapter, targets: list[str], ranks: dict[str, int]) -> list[str]:
    """Problems with how the model uses its targets: a LoRA needs to be called, a router to see rows and positions."""
    model: Any = adapter.model
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = next((name for name, module in model.named_modules() if module is output), None)
    unfit = [name for name, rank in ranks.items() if not rank or (adapter.routers and rank != 3)]
    bad = next((name for name in unfit if name in targets), None)
    if bad is None:
        return []
    useless = [*unfit, str(head)]
    could = list(dict.fromkeys(end for name in ranks if (end := _end_of_none(name, useless))))
    uncalled = "is not called as a layer in training: its weight is read directly, or not at all"
    what = ONE_LIST if ranks[bad] else uncalled
    return [f"adapter.target_modules: {bad} {what}; {adapter.config.method} can adapt: {', '.join(could) or 'nothing'}"]


def _has_targets(method: str) -> bool:
    return "target_modules" in method_named(method).settings


def _end_of_none(name: str, others: list[str]) -> str | None:
    """The last word of `name`, or the last two, whichever no other ends with."""
    words = name.split(".")
    ends = (".".join(words[-count:]) for count in (1, 2))
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), None)


def _check_pass(adapter: Adapter) -> list[str]:
    """Problems that a pass of the adapted skeleton runs into.

    As in an evaluation, with which training begins: how training uses the targets, `_check_inputs` has seen.
    """
    ids = meta_ids()
    trace = Trace(prompt=torch.ones_like(ids, dtype=torch.bool))
    with rehearsing(adapter.model, training=False):
        try:
            with adapter.tracing(trace):
                logits = adapter.model(input_ids=ids, use_cache=False).logits
        except RecipeError as error:
            return error.problems
        except Exception as error:  # of whatever code a model or PEFT brings
            if type(_alone(adapter, ids)) is type(error):  # what a skeleton cannot do at all
                return []
            said = shortened(f"{type(error).__name__}: {error}", 120)
            if not _has_targets(adapter.config.method):
                return [f"adapter.method: {adapter.config.method} does not suit this model: {said}"]
            return [f"adapter.target_modules: {adapter.config.method} cannot adapt these in this model: {said}"]
    if adapter.parameters() and not logits.requires_grad:
        return [f"adapter: {adapter.config.method} changes nothing in this model: its output does not depend on it"]
    missed = next((name for name in adapter.routers if name not in trace.decisions), None)
    return [f"adapter.target_modules: {missed} is not called in training; leave it out"] if missed else []


@torch.no_grad()
def _alone(adapter: Adapter, ids: torch.Tensor) -> Exception | None:
    """What a pass of the skeleton without its adapter ends with."""
    try:
        with adapter.disabled():
            adapter.model(input_ids=ids, use_cache=False)
    except Exception as error:
        return error
    return None


def check_output(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that holds something else. Reads only. Raises RecipeError."""
    folder = RunFolder(Path(recipe.output_dir))
    if resume:
        if not folder.recipe.is_file():
            raise RecipeError(f"output_dir: {folder.path} holds no run to resume; leave --resume out to start one")
        return
    if not os.path.lexists(folder.path):
        return
    if not folder.path.exists():
        raise RecipeError(f"output_dir: {folder.path} is a link that leads nowhere; make the folder, or remove it")
    if not folder.path.is_dir():
        raise RecipeError(f"output_dir: {folder.path} is not a folder")
    strange = sorted(
        p.name for p in folder.path.iterdir() if p.name not in RunFolder.OWN and not p.name.startswith(".")
    )
    if strange:
        raise RecipeError(f"output_dir: {folder.path} holds other files ({strange[0]}); choose another folder")
    if folder.recipe.exists():
        if not overwrite:
            raise RecipeError(
                f"output_dir: {folder.path} holds a run; add --resume to go on or --overwrite to replace it"
            )
        return
    present = [name for name in RunFolder.OWN if (folder.path / name).exists()]
    if present:  # without a recipe these are not a run of ours
        raise RecipeError(f"output_dir: {folder.path} holds other files ({present[0]}); choose another folder")


def check_space(recipe: Recipe, skeleton: Adapter) -> None:
    """Refuse a run whose checkpoints cannot fit. Raises StorageError.

    At most `save_total_limit` checkpoints and a new one stand side by side, each the adapter and AdamW's two
    moments in float32; besides them the last and the best adapter.
    """
    needed = adapter_bytes(skeleton) * (3 * (recipe.train.save_total_limit + 1) + 2)
    folder = RunFolder(Path(recipe.output_dir))
    own = sum(p.stat().st_size for name in RunFolder.OWN for p in (folder.path / name).rglob("*") if p.is_file())
    free = free_bytes(folder.path) + own  # what this run holds already, or the one it replaces
    if needed > free:
        raise StorageError(
            f"output_dir: {recipe.output_dir} needs {needed / MIB:.1f} MiB for {recipe.train.save_total_limit} "
            f"checkpoints and the one being written, {free / MIB:.1f} MiB are free; lower train.save_total_limit, "
            "adapter.rank or adapter.pool_size, or choose another disk"
        )


def clear_output(folder: RunFolder) -> None:
    """Remove what a run of ours wrote, and nothing else; the recipe, which marks the folder as ours, last.

    Raises StorageError.
    """
    for name in reversed(RunFolder.OWN):
        path = folder.path / name
        with storage_errors(path):
            remove(path)


def check_graphs(recipe: Recipe, model: Any) -> None:
    """Raises RecipeError if the model draws random numbers while it trains: a recorded step would repeat them."""
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    drops = drops or bool(getattr(model.config, "attention_dropout", None))
    if recipe.train.cuda_graphs and drops:
        raise RecipeError("train.cuda_graphs: the base model has dropout of its own; leave cuda_graphs out")


def check_hardware(recipe: Recipe, device: torch.device) -> None:
    if recipe.train.cuda_graphs and device.type != "cuda":
        raise RecipeError("train.cuda_graphs: needs a GPU; leave it out on this machine")
    if recipe.model.dtype == "float16" and device.type != "cuda":
        raise RecipeError("model.dtype: float16 training needs a GPU (its loss scaling does); use bfloat16 or float32")
