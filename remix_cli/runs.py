"""The run folder, and a finished run loaded back: what every verb but `train` starts from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remix_cli.adapter.config import AdapterConfig
from remix_cli.adapter.patch import Adapter
from remix_cli.adapter.store import CONFIG_FILE, BaseIdentity, StoredAdapter, load_stored
from remix_cli.data.encode import Encoder
from remix_cli.errors import ArtefactError, RecipeError
from remix_cli.methods.apply import apply_method
from remix_cli.models import DTYPES, identify, load_model, load_tokenizer
from remix_cli.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class RunFolder:
    """Names of what a run holds. `adapter/` is the last adapter, `best/` the one of lowest held-out loss."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def statistics(self) -> Path:
        return self.path / "stats"

    @property
    def is_model(self) -> bool:
        """A model in the hub's format, exported or anyone's, and no run of ours."""
        return (self.path / "config.json").is_file() and not self.recipe.is_file()

    def load_recipe(self) -> Recipe:
        """The run's own recipe; for a model folder one that says no more than where it is. Raises ArtefactError."""
        if self.is_model:
            found = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            dtype = found.get("dtype") or found.get("torch_dtype") or "float32"
            model = {"name_or_path": str(self.path), "dtype": dtype if dtype in DTYPES else "float32"}
            data = {"train": [{"path": "rows.jsonl"}]}
            return Recipe.model_validate({"model": model, "data": data, "output_dir": str(self.path)})
        if not self.recipe.is_file():
            raise ArtefactError(
                f"{self.path}: not a run folder (no recipe.yaml); give the output_dir of a `remix train`"
            )
        return load_recipe(self.recipe)

    OWN = (
        "recipe.yaml",
        "adapter",
        "best",
        "checkpoints",
        "metrics.jsonl",
        "summary.json",
        "eval",
        "stats",
        "tensorboard",
    )


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


@dataclass
class LoadedRun(Subject):
    """A run ready for inference: top-k routing, nothing trainable."""

    folder: RunFolder
    which: str  # `adapter` (the last), `best`, or `model` for a folder that is a model itself
    stored: StoredAdapter
    identity: BaseIdentity  # of the base model and tokenizer that were loaded


def load_model_folder(path: Path, *, trust_code: bool = False, device: torch.device | None = None) -> LoadedRun:
    """A model without an adapter of ours, to be evaluated like one. Raises RecipeError if it cannot be loaded.

    Code that the folder brings along runs only with `trust_code`; without it the folder is refused, for transformers
    would ignore the code, and with it the router and LoRAs of a model that we exported.
    """
    folder = RunFolder(path)
    recipe = folder.load_recipe()
    if "auto_map" in json.loads((path / "config.json").read_text(encoding="utf-8")):
        if not trust_code:
            raise RecipeError(f"{path}: brings its own modelling code; add --trust-remote-code to run it")
        model = recipe.model.model_copy(update={"trust_remote_code": True})
        recipe = recipe.model_copy(update={"model": model})
    model = load_model(recipe.model, device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(recipe.model)
    config = AdapterConfig(method="none", pool_size=1, active=1)
    identity = identify(recipe.model, model, tokenizer)
    stored = StoredAdapter(config, identity, {}, "")
    encoder = Encoder.of(tokenizer, recipe.data)
    return LoadedRun(recipe, model, tokenizer, Adapter(model, config), encoder, folder, "model", stored, identity)


def load_run(
    path: Path, *, best: bool = False, any_base: bool = False, device: torch.device | None = None
) -> LoadedRun:
    """Load the recipe, base model and adapter of the run at `path`.

    Raises ArtefactError if this is not a finished run, or the adapter was trained on another base model or
    tokenizer and `any_base` does not allow it.
    """
    folder = RunFolder(path)
    where = folder.best if best else folder.adapter
    recipe = folder.load_recipe()
    if not (where / CONFIG_FILE).is_file():
        if best and folder.summary.is_file():
            raise ArtefactError(
                f"{where}: no evaluation beat the base model, so there is no best adapter; leave out --best"
            )
        raise ArtefactError(f"{where}: no adapter yet; finish the run with `remix train {folder.recipe} --resume`")
    stored = load_stored(where)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(recipe.model, device)
    tokenizer = load_tokenizer(recipe.model)
    found = identify(recipe.model, model, tokenizer)
    other = [
        what
        for what, same in (
            ("base model", found.base_fingerprint == stored.identity.base_fingerprint),
            ("tokenizer", found.tokenizer_fingerprint == stored.identity.tokenizer_fingerprint),
        )
        if not same
    ]
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
