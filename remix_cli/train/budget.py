"""Sizes from shapes alone: of every method for equal parameter counts, and of a run whose base is not here yet.

`remix budget` says how large each method has to be to have so many parameters, counted on the recipe's own model. Every
count is affine in one number of the method (its rank, pool size, virtual tokens or vectors), so two adapters on a
skeleton of the model give the line, and the number follows.

`remix validate` takes a base that is out of reach by its published shape. Then there is no tokenizer either, so no row
is read, and the longest batch is as long as the recipe allows.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import TargetError
from remix_cli.diagnostics.parameters import ParameterCounts, count_parameters
from remix_cli.errors import RecipeError
from remix_cli.methods.apply import apply_method
from remix_cli.methods.registry import method_named, methods_by_name
from remix_cli.models import known_base, out_of_reach, skeleton
from remix_cli.recipe import Recipe
from remix_cli.recipe.schema import Adapter as AdapterRecipe
from remix_cli.stored_json import Document
from remix_cli.train.micro_batch import passes_of
from remix_cli.train.prepare import check_recipe
from remix_cli.train.preview import estimate_memory

Count = Literal["trained", "active"]
MOST = 4  # times the base model: beyond any adapter; some methods take real memory to be counted


@dataclass(frozen=True)
class Sized:
    """One method at the size whose count comes nearest to the target."""

    method: str
    knob: str  # the setting that was solved for; empty if the method has none
    value: int
    trained: int
    active: int
    fixed: str  # the settings that were kept
    problem: str = ""

    def count(self, what: Count) -> int:
        return self.trained if what == "trained" else self.active

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ShapeEstimate:
    """What can be said of a run by the shape of its base, without a tokenizer."""

    recipe: Recipe
    tokens_per_row: int  # that every row is taken to have
    rows_per_step: int
    passes: int  # forward passes over each row of a step
    counts: ParameterCounts
    memory: dict[str, float]  # GiB by what it is for

    def to_dict(self) -> Document:
        return {
            "base": "shape known, weights not looked at",
            "tokens_per_row": self.tokens_per_row,
            "rows_per_step": self.rows_per_step,
            "passes": self.passes,
            "model": self.recipe.model.model_dump(),
            "parameters": self.counts.to_dict(),
            "memory_gib": self.memory,
            "estimator": self.recipe.router.estimator,
        }


def by_known_shape(recipe: Recipe) -> Recipe | None:
    """The recipe with its base by the published shape, if that is known and the base itself is out of reach."""
    base = known_base(recipe.model)
    if base is None or not out_of_reach(recipe.model):
        return None
    return recipe.model_copy(update={"model": base})


def estimate_by_shape(recipe: Recipe, processes: int = 1) -> ShapeEstimate:
    """As `processes` processes would train it on rows of `data.max_length` tokens. Reads no row and no weight.

    Raises RecipeError for what else is wrong with the recipe.
    """
    adapter = check_recipe(recipe)
    counts, longest = count_parameters(adapter), recipe.data.max_length
    config: Any = adapter.model.config
    return ShapeEstimate(
        recipe,
        longest,
        recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * processes,
        passes_of(recipe.router, recipe.adapter_config().samples).total,
        counts,
        estimate_memory(recipe, config.get_text_config(), counts, longest, processes),
    )


def solve_budget(recipe: Recipe, target: int | None, what: Count) -> tuple[int, list[Sized]]:
    """The target, by default the recipe's own count, and every method's size for it. Raises RecipeError."""
    try:
        own = _count(recipe, recipe.adapter_config())
    except TargetError as error:
        raise RecipeError(f"adapter.target_modules: {error}") from None
    target = target or own[what]
    if not target:
        raise RecipeError(f"adapter.method: {recipe.adapter.method} trains nothing to go by; give --parameters")
    if target > MOST * own["base"]:
        raise RecipeError(
            f"--parameters: {target:,} are more than four times the model itself ({own['base']:,}); give fewer"
        )
    sizes = []
    for name, method in methods_by_name().items():
        if method.trains:
            sizes += [_solve(recipe, name, knob, target, what) for knob in method.sizes or ("",)]
    return target, sizes


def _solve(recipe: Recipe, method: str, knob: str, target: int, what: Count) -> Sized:
    config = _config(recipe, method)
    kept = _kept(config, knob)
    try:
        if not knob:
            counts = _count(recipe, config)
            return Sized(method, "", 0, counts["trained"], counts["active"], kept)
        # the smallest sizes that exist: a pool holds its k active LoRAs, a rank is 1
        low = config.active if knob == "pool_size" and _chooses_active(method) else 1
        small, large = (_count(recipe, _with(config, knob, low + i))[what] for i in (0, 1))
        value = low if large == small else max(low, low + round((target - small) / (large - small)))
        counts = _count(recipe, _with(config, knob, value))
        return Sized(method, knob, value, counts["trained"], counts["active"], kept)
    except TargetError as error:
        return Sized(method, knob, 0, 0, 0, kept, str(error))


def _chooses_active(method: str) -> bool:
    """Is k a setting? Else every LoRA is always on."""
    return "active" in method_named(method).settings


def _kept(config: AdapterConfig, knob: str) -> str:
    """The sizes of a routed pool that are not solved for."""
    if not config.routed:
        return ""
    other = f"r={config.rank}" if knob == "pool_size" else f"n={config.pool_size}"
    return f"{other} k={config.active}" if _chooses_active(config.method) else other


def _config(recipe: Recipe, name: str) -> AdapterConfig:
    """The method with those of the recipe's adapter settings that it reads, its own defaults otherwise."""
    method = method_named(name)
    if recipe.adapter.method == name:
        return recipe.adapter_config()
    given = {key: getattr(recipe.adapter, key) for key in method.settings}
    if "active" in given:
        given["active"] = min(given["active"], given["pool_size"])
    adapter = AdapterRecipe.model_validate({"method": name} | given | method.adapter_defaults)
    router = recipe.router.model_copy(update={"scope": method.router_defaults.get("scope", "block")})
    return recipe.model_copy(update={"adapter": adapter, "router": router}).adapter_config()


def _with(config: AdapterConfig, knob: str, value: int) -> AdapterConfig:
    if knob == "pool_size" and not _chooses_active(config.method):
        return replace(config, pool_size=value, active=value)
    changed: dict[str, Any] = {knob: value}
    if knob in config.settings:
        changed = {"settings": config.settings | changed}
    return replace(config, **changed)


def _count(recipe: Recipe, config: AdapterConfig) -> dict[str, int]:
    return count_parameters(apply_method(skeleton(recipe.model), config, seed=0)).to_dict()
