"""A finished run loaded back: what every verb but `train` starts from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remix_cli.core.lora_folder import PEFT_WEIGHTS
from remix_cli.core.patch import Adapter
from remix_cli.core.store import BaseIdentity, StoredAdapter, TrainedOn, load_stored
from remix_cli.data.encode import Encoder, load_examples
from remix_cli.data.formats import Example
from remix_cli.data.rows import EncodedRow
from remix_cli.data.said import digest_of
from remix_cli.data.splits import evenly, held_out_examples
from remix_cli.errors import ArtefactError, DataError, RecipeError, shortened
from remix_cli.folders import BegunWith, RunFolder, check_run
from remix_cli.launch import own_device
from remix_cli.methods.apply import apply_method, unadapted
from remix_cli.models import identify, load_model, load_tokenizer
from remix_cli.recipe import Recipe
from remix_cli.storage import sha256

__all__ = ["BegunWith", "LoadedRun", "RunFolder", "Subject", "load_model_folder", "load_run", "load_subject"]


@dataclass
class Subject:
    """A model with its adapter in place and what it takes to ask it something."""

    recipe: Recipe
    model: Any
    tokenizer: Any
    adapter: Adapter
    encoder: Encoder

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def held_out(self) -> str | None:
        """digest_of the rows that were held out when the adapter was trained, where that is known."""
        return None

    def held_out_examples(self) -> list[Example]:
        """What the recipe holds out of training. Raises DataError, ArtefactError if these are other rows now.

        Whatever is measured on the recipe's own held-out rows takes them from here: rows of a changed file may be
        rows that the adapter was trained on.
        """
        examples = held_out_examples(self.recipe)
        if self.held_out not in (None, digest_of(examples)):
            data = self.recipe.data
            places = ", ".join(source.named for source in data.validation or data.train)
            raise ArtefactError(
                f"{shortened(places)}: changed since the training, whose held-out rows were others: some of these may "
                "have been trained on; restore the rows, or name others with --data FILE"
            )
        return examples

    def rows_to_look_at(self, data: str | None, limit: int | None) -> list[EncodedRow]:
        """The recipe's held-out rows, or those of the file `data` in its first format, at most `limit`.

        Raises DataError, also for no row at all, and as `held_out_examples`.
        """
        if data is None:
            examples = self.held_out_examples()
        else:
            examples, _ = load_examples([self.recipe.data.train[0].at(data)])
        rows = list(self.encoder.encode_rows(evenly(examples, limit)).rows)
        if not rows:
            raise DataError("no rows to look at; give --data FILE or data.validation in the recipe")
        return rows


@dataclass
class LoadedRun(Subject):
    """A run ready for inference: top-k routing, nothing trainable."""

    folder: RunFolder
    which: str  # `adapter` (the last), `best`, or `model` for a folder that is a model itself
    stored: StoredAdapter
    identity: BaseIdentity  # of the base model and tokenizer that were loaded

    @property
    def held_out(self) -> str | None:
        return self.stored.trained_on.held_out


def load_model_folder(path: Path, *, trust_code: bool = False, device: torch.device | None = None) -> LoadedRun:
    """A model without an adapter of ours, to be evaluated like one. Raises RecipeError if it cannot be loaded.

    Code that the folder brings along runs only with `trust_code`; without it the folder is refused, for transformers
    would ignore the code, and with it the router and LoRAs of a model that we exported.
    """
    folder = RunFolder(path)
    recipe = folder.load_recipe()
    if "auto_map" in folder.model_config():
        if not trust_code:
            raise RecipeError(f"{path}: brings its own modelling code; add --trust-remote-code to run it")
        model = recipe.model.model_copy(update={"trust_remote_code": True})
        recipe = recipe.model_copy(update={"model": model})
    model = load_model(recipe.model, device or own_device())
    tokenizer = load_tokenizer(recipe.model)
    adapter = unadapted(model)
    identity = identify(recipe.model, model, tokenizer)
    stored = StoredAdapter(adapter.config, identity, {}, "", TrainedOn())
    encoder = Encoder.of(tokenizer, recipe.data)
    return LoadedRun(recipe, model, tokenizer, adapter, encoder, folder, "model", stored, identity)


def load_peft_folder(path: Path, *, device: torch.device | None = None) -> LoadedRun:
    """A PEFT adapter on the base model that it names, to be asked like a run. Raises ArtefactError, RecipeError."""
    from remix_cli.methods.peft_given import GivenPeft

    folder = RunFolder(path)
    recipe = folder.load_recipe()
    model = load_model(recipe.model, device or own_device())
    own = recipe.model.model_copy(update={"name_or_path": str(path)})
    tokenizer = load_tokenizer(own if (path / "tokenizer_config.json").is_file() else recipe.model)
    identity = identify(recipe.model, model, tokenizer)
    adapter = GivenPeft(model, path)
    stored = StoredAdapter(adapter.config, identity, {}, sha256(path / PEFT_WEIGHTS), TrainedOn())
    encoder = Encoder.of(tokenizer, recipe.data)
    return LoadedRun(recipe, adapter.model, tokenizer, adapter, encoder, folder, "adapter", stored, identity)


def load_subject(path: Path, *, best: bool = False, any_base: bool = False, trust_code: bool = False) -> LoadedRun:
    """Whatever can be asked something: a run, a model in the hub's format, a PEFT adapter. Raises as those do."""
    folder = RunFolder(path)
    if folder.is_model:
        return load_model_folder(path, trust_code=trust_code)
    if folder.is_peft:
        return load_peft_folder(path)
    return load_run(path, best=best, any_base=any_base)


def load_run(
    path: Path, *, best: bool = False, any_base: bool = False, device: torch.device | None = None
) -> LoadedRun:
    """Load the recipe, base model and adapter of the run at `path`.

    Raises ArtefactError if this is not a finished run, or the adapter was trained on another base model or
    tokenizer and `any_base` does not allow it.
    """
    folder = check_run(path, best=best)
    where = folder.best if best else folder.adapter
    recipe = folder.load_recipe()
    base = recipe.model
    if base.is_local and not Path(base.name_or_path).exists():
        raise ArtefactError(
            f"{folder.recipe}: model.name_or_path: {base.name_or_path} is not on this machine; put the base model "
            "there, or write there where it lies now"
        )
    stored = load_stored(where)
    device = device or own_device()
    model = load_model(recipe.model, device)
    tokenizer = load_tokenizer(recipe.model)
    found = identify(recipe.model, model, tokenizer)
    other = stored.identity.differences(found)
    if other and not any_base:
        raise ArtefactError(
            f"{where}: trained on another {' and '.join(other)} than {recipe.model.name_or_path} now holds; "
            f"restore the {stored.identity.base_model} it was trained on, or add --any-base"
        )
    adapter = apply_method(model, stored.config, seed=0)
    try:
        adapter.load(stored.tensors)
    except ValueError as error:
        raise ArtefactError(f"{where}: {error}") from None
    adapter.model.requires_grad_(False).eval()
    encoder = Encoder.of(tokenizer, recipe.data)
    return LoadedRun(recipe, adapter.model, tokenizer, adapter, encoder, folder, where.name, stored, found)
