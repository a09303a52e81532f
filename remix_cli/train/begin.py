"""What a run begins from where that is no new adapter: `adapter.init_from`.

One folder of the same method and shape gives the whole adapter, router included. Otherwise each folder is one LoRA of
the pool, and the router is as new (core/lora_folder.py has the formula). `check` needs no weights; `read` is called
once for a run: its first checkpoint holds what was read, so that a resumed run needs the folders no more.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from remix_cli.core.config import AdapterConfig
from remix_cli.core.description import CONFIG_FILE, BaseIdentity, read_description, read_shapes
from remix_cli.core.lora_folder import LoraFolder, is_peft, load_pool, read_lora
from remix_cli.core.patch import Adapter, last_names
from remix_cli.core.store import load_stored
from remix_cli.errors import ArtefactError, RecipeError, RemixError
from remix_cli.recipe import Recipe
from remix_cli.runs import RunFolder

KEY = "adapter.init_from"
# Fields of an adapter's config that are free: they say how it is drawn or trained, or are compared by its tensors.
FREE = ("target_modules", "dropout", "router_init_std", "settings")
OF_ROUTER = {"router_unit_input": "unit_input"}  # keys of `router` by another name; scope, level and clusters by theirs


@dataclass(frozen=True)
class Beginning:
    """The tensors that an adapter begins with; those that are missing stay as they were drawn."""

    tensors: dict[str, Tensor]
    read: list[dict[str, str]]  # `folder` as the recipe names it, `sha256` of its weights; in the recipe's order

    def apply(self, adapter: Adapter) -> None:
        """Raises ValueError for tensors that are none of the adapter's."""
        adapter.load(adapter.tensors() | self.tensors)

    @property
    def has_clusters(self) -> bool:
        return any(name.endswith(".router_centres") for name in self.tensors)


def check(recipe: Recipe, skeleton: Adapter) -> list[str]:
    """Why the recipe's adapter cannot begin from its `init_from`, a line each."""
    if recipe.adapter.init_from is None:
        return []
    problems = []
    output = Path(recipe.output_dir).absolute()
    for name in _folders(recipe):
        if not os.path.isdir(name):
            problems.append(f"{KEY}: {name}: no such folder")
        elif output.exists() and Path(name).resolve().is_relative_to(output.resolve()):
            problems.append(f"{KEY}: {name}: lies in output_dir, which the run replaces; choose another output_dir")
    if problems:
        return problems
    try:
        _plan(recipe, skeleton)
    except RemixError as error:
        return [problem if problem.startswith(KEY) else f"{KEY}: {problem}" for problem in error.problems]
    return []


def read(recipe: Recipe, adapter: Adapter, base: BaseIdentity, processes: int) -> Beginning | None:
    """None where the recipe names no folder. Raises ArtefactError, RecipeError."""
    if recipe.adapter.init_from is None:
        return None
    plan = _plan(recipe, adapter)
    if isinstance(plan, Path):
        stored = load_stored(plan)
        identities = {str(plan): stored.identity}
        tensors, digests = stored.tensors, [stored.weights_sha256]
    else:
        identities = {str(lora.path): lora.identity for lora in plan if lora.identity is not None}
        tensors, digests = load_pool(plan, recipe.adapter_config().scale)
    for folder, identity in identities.items():
        other = identity.differences(base)
        if other:
            raise ArtefactError(
                f"{KEY}: {folder}: trained on another {' and '.join(other)} than {recipe.model.name_or_path} holds; "
                f"use {identity.base_model} as it was then"
            )
    found = [{"folder": name, "sha256": digest} for name, digest in zip(_folders(recipe), digests, strict=True)]
    if processes > 1 and any(other != found for other in gather_object([found])):
        raise RecipeError(f"{KEY}: not all processes have read the same weights; give every one the same files")
    return Beginning(tensors, found)


def _folders(recipe: Recipe) -> list[str]:
    named = recipe.adapter.init_from
    if named is None:
        return []
    return [named] if isinstance(named, str) else list(named)


def _plan(recipe: Recipe, adapter: Adapter) -> Path | list[LoraFolder]:
    """The one folder of a whole adapter, or the LoRAs of the pool; all of which fit. Raises ArtefactError."""
    places = [_place(Path(name)) for name in _folders(recipe)]
    if len(places) == 1 and not is_peft(places[0]):
        unlike = _unlike(read_description(places[0]).config, recipe)
        alone = recipe.adapter_config()
        if not unlike:
            _check_tensors(places[0], adapter)
            return places[0]
        if alone.pool_size > 1 or alone.pool is None or read_description(places[0]).config.rank != alone.rank:
            raise ArtefactError(*(f"{places[0]}: {line}" for line in unlike))
    _check_method(recipe)
    loras, problems = [], []
    for place in places:
        try:
            lora = read_lora(place)
            problems += _misfits(lora, recipe, adapter)
            loras.append(lora)
        except ArtefactError as error:
            problems += error.problems
    if len(places) != recipe.adapter.pool_size and recipe.adapter_config().routed:
        problems.append(f"{KEY}: names {len(places)} LoRAs, but adapter.pool_size is {recipe.adapter.pool_size}")
    elif len(places) > 1 and not recipe.adapter_config().routed:
        problems.append(f"{KEY}: names {len(places)} LoRAs, and {recipe.adapter.method} has one; name one of them")
    if problems:
        raise ArtefactError(*problems)
    return loras


def _place(folder: Path) -> Path:
    """Of a run the folder of its last adapter; others as they are. Raises ArtefactError."""
    run = RunFolder(folder)
    if is_peft(folder) or (folder / CONFIG_FILE).is_file():
        return folder
    if not run.recipe.is_file():
        raise ArtefactError(f"{folder}: neither a run, nor an adapter of one, nor a PEFT folder")
    if not (run.adapter / CONFIG_FILE).is_file():
        raise ArtefactError(f"{folder}: has no adapter yet; finish it with `remix train {run.recipe} --resume`")
    return run.adapter


def _unlike(theirs: AdapterConfig, recipe: Recipe) -> list[str]:
    """In what an adapter is of another method or shape than the recipe's, by keys of the recipe."""
    ours = recipe.adapter_config()
    if theirs.method != ours.method:
        return [f"is of method {theirs.method}, and adapter.method is {ours.method}"]
    differences = []
    free = {*FREE, "pool_size"} if ours.of_modules else FREE  # which follows from target_modules
    for field in fields(AdapterConfig):
        his, mine = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name not in free and his != mine:
            differences.append(f"{_key_of(field.name)} was {his} there, and is {mine} here; set it to {his}")
    for name in sorted(theirs.settings.keys() | ours.settings.keys()):
        his, mine = theirs.settings.get(name), ours.settings.get(name)
        if his != mine:
            differences.append(f"adapter.{name} was {his} there, and is {mine} here; set it to {his}")
    return differences


def _key_of(field: str) -> str:
    """The recipe's key of a field of AdapterConfig."""
    if field in ("scope", "level", "clusters", *OF_ROUTER):
        return f"router.{OF_ROUTER.get(field, field)}"
    return f"adapter.{field}"


def _check_tensors(folder: Path, adapter: Adapter) -> None:
    """Raises ArtefactError unless the folder's tensors are those that the recipe's adapter has."""
    own = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
    found = read_shapes(folder)
    if own.keys() != found.keys():
        said = ", ".join(read_description(folder).config.target_modules)
        raise ArtefactError(f"{folder}: adapts other layers of the model; set adapter.target_modules to [{said}]")
    other = next((name for name, shape in own.items() if found[name] != shape), None)
    if other is not None:
        raise ArtefactError(f"{folder}: {other} is {found[other]}, and {own[other]} on this model.name_or_path")


def _check_method(recipe: Recipe) -> None:
    """Raises RecipeError for a method that LoRAs cannot be put into as they are."""
    config = recipe.adapter_config()
    if config.pool is None:
        reason = "is no LoRA of ours: name a run of the same method"
    elif config.residual:
        reason = "would join LoRAs that were trained apart: name a run of the same method"
    elif config.of_modules:
        reason = "has one LoRA on each linear, and a choice among linears: name a run of the same method"
    elif config.shares_a or config.rule == "softmax":
        reason = "would weight LoRAs otherwise than they were trained: name a run of the same method, or use remix"
    else:
        return
    raise RecipeError(f"{KEY}: {config.method} {reason}")


def _misfits(lora: LoraFolder, recipe: Recipe, adapter: Adapter) -> list[str]:
    """Why this is no LoRA of the recipe's pool, each with the folder and the key."""
    where, problems = lora.path / lora.described_in, []
    if lora.rank != recipe.adapter.rank:
        problems.append(f"{where}: r is {lora.rank}, and adapter.rank is {recipe.adapter.rank}")
    named, ours = lora.base_model, recipe.model.name_or_path
    if lora.identity is None and named and Path(named).name != Path(ours).name:
        problems.append(
            f"{where}: base_model_name_or_path is {named}, and model.name_or_path is {ours}; if these are the same "
            "model, write the latter there"
        )
    theirs, own = set(lora.shapes), set(adapter.linears)
    if theirs != own:
        example = sorted(theirs ^ own)[0]
        problems.append(
            f"{where}: target_modules are {', '.join(last_names(sorted(lora.shapes)))}, and adapter.target_modules "
            f"{', '.join(last_names(adapter.linears))} (only one of the two has {example})"
        )
        return problems
    for name, linear in adapter.linears.items():
        base: Any = linear.base_layer
        wanted = ((lora.rank, int(base.in_features)), (int(base.out_features), lora.rank))
        if lora.shapes[name] != wanted:
            found = " and ".join(map(str, lora.shapes[name]))
            problems.append(f"{where}: A and B of {name} are {found}, and {wanted[0]} and {wanted[1]} on this model")
            break
    return problems
