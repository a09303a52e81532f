"""`remix budget`: how large each method has to be to have so many parameters, counted on the recipe's own model.

Every count is affine in one number of the method (its rank, pool size, virtual tokens or vectors), so two adapters
on a skeleton of the model give the line, and the number follows.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import TargetError
from remix_cli.diagnostics.parameters import count_parameters
from remix_cli.errors import RecipeError
from remix_cli.methods.apply import apply_method
from remix_cli.methods.registry import method_named, methods_by_name
from remix_cli.models import skeleton
from remix_cli.recipe import Recipe
from remix_cli.recipe.schema import Adapter as AdapterRecipe

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
    """The method with those of the recipe's adapter settings that it reads; its own defaults where it has some."""
    method = method_named(name)
    if recipe.adapter.method == name:
        return recipe.adapter_config()
    given = {key: getattr(recipe.adapter, key) for key in method.settings}
    if {"active", "pool_size"} <= given.keys():
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
