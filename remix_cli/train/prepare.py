"""From a recipe to everything the loop needs. What can be refused cheaply is refused first."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remix_cli.adapter.patch import Adapter, TargetError, apply_adapter
from remix_cli.data.batches import Plan
from remix_cli.data.encode import Encoded, Encoder, load_examples
from remix_cli.data.formats import Example
from remix_cli.data.sources import check_source
from remix_cli.errors import DataError, RecipeError
from remix_cli.models import load_tokenizer, skeleton
from remix_cli.recipe import Recipe
from remix_cli.runs import RunFolder


def check_recipe(recipe: Recipe) -> Adapter:
    """Problems beyond the schema, found without loading weights or rows; all of them at once.

    Returns the adapter on a model skeleton (no memory for weights), for names and counts.
    Raises RecipeError.
    """
    problems = []
    places = [("data.train", recipe.data.train), ("data.validation", recipe.data.validation)]
    for key, sources in places:
        for i, source in enumerate(sources):
            problems += check_source(source, f"{key}.{i}")
    for i, task in enumerate(recipe.eval.tasks):
        if task.source is not None:
            problems += check_source(task.source, f"eval.tasks.{i}.source")
    try:
        model = skeleton(recipe.model)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and recipe.data.max_length > limit:
            problems.append(f"data.max_length: {recipe.data.max_length}, but the model reads at most {limit} tokens")
        adapter = apply_adapter(model, recipe.adapter_config(), seed=recipe.seed)
    except RecipeError as error:
        problems += error.problems
    except TargetError as error:
        problems.append(f"adapter.target_modules: {error}")
    if problems:
        raise RecipeError(*problems)
    return adapter


def check_output(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that holds something else. Reads only. Raises RecipeError."""
    folder = RunFolder(Path(recipe.output_dir))
    if resume:
        if not folder.recipe.is_file():
            raise RecipeError(f"output_dir: {folder.path} holds no run to resume; leave --resume out to start one")
        return
    if not folder.path.exists():
        return
    if not folder.path.is_dir():
        raise RecipeError(f"output_dir: {folder.path} is not a folder")
    strange = sorted(p.name for p in folder.path.iterdir() if p.name not in RunFolder.OWN and not p.name.startswith("."))
    if strange:
        raise RecipeError(f"output_dir: {folder.path} holds other files ({strange[0]}); choose another folder")
    if folder.recipe.exists() and not overwrite:
        raise RecipeError(f"output_dir: {folder.path} holds a run; add --resume to go on or --overwrite to replace it")


def clear_output(folder: RunFolder) -> None:
    """Remove what a run of ours wrote, and nothing else."""
    for name in RunFolder.OWN:
        path = folder.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass
class TrainingData:
    train: Encoded
    validation: Encoded
    plan: Plan
    tokenizer: Any
    sample: Example

    def total_steps(self, recipe: Recipe) -> int:
        by_epochs = int(np.ceil(self.plan.steps_per_epoch * recipe.train.num_train_epochs))
        return min(by_epochs, recipe.train.max_steps or by_epochs)


def held_out_sources(recipe: Recipe) -> tuple[list[Example], list[int], list[Example]]:
    """Training examples with their count per source, and held-out examples.

    Without `data.validation`, each source gives a share of its rows, the same ones for one seed.
    """
    examples, counts = load_examples(recipe.data.train)
    if recipe.data.validation:
        held, _ = load_examples(recipe.data.validation)
        return examples, counts, held[: recipe.data.validation_limit]
    random = np.random.default_rng([recipe.seed, 1])
    total = sum(counts)
    share = min(recipe.data.validation_fraction, recipe.data.validation_limit / total)
    train, held, kept, start = [], [], [], 0
    for count in counts:
        out = set(random.permutation(count)[: round(count * share)].tolist())
        train += [examples[start + i] for i in range(count) if i not in out]
        held += [examples[start + i] for i in sorted(out)]
        kept.append(count - len(out))
        start += count
    return train, kept, held


def load_data(recipe: Recipe, world: int = 1) -> TrainingData:
    """Read, hold out, tokenise and plan. Raises DataError."""
    tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, recipe.data.max_length, recipe.data.use_chat_template)
    examples, counts, held = held_out_sources(recipe)
    parts, start = [], 0
    for count in counts:
        parts.append(encoder.encode_rows(examples[start : start + count]))
        start += count
    train = Encoded(
        [row for part in parts for row in part.rows],
        sum(p.read for p in parts),
        sum(p.truncated for p in parts),
        sum(p.dropped for p in parts),
    )
    for part, source in zip(parts, recipe.data.train, strict=True):
        if not part.rows:
            raise DataError(
                f"{source.path or source.reasoning_gym}: no row has a supervised token within "
                f"data.max_length = {recipe.data.max_length}; raise it"
            )
    plan = Plan(
        lengths=train.lengths,
        counts=tuple(len(p.rows) for p in parts),
        weights=tuple(s.weight for s in recipe.data.train),
        rows_per_step=recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * world,
        group_by_length=recipe.train.group_by_length,
        seed=recipe.seed,
    )
    return TrainingData(train, encoder.encode_rows(held), plan, tokenizer, examples[0])


def check_hardware(recipe: Recipe, device: torch.device) -> None:
    if recipe.model.dtype == "float16" and device.type != "cuda":
        raise RecipeError("model.dtype: float16 training needs a GPU (its loss scaling does); use bfloat16 or float32")
