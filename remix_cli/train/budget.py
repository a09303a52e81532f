"""`remix budget`: how large each method has to be to have so many parameters, counted on the recipe's own model.

Every count is affine in one number of the method (its rank, pool size, virtual tokens or vectors), so two adapters
on a skeleton of the model give the line, and the number follows.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from remix_cli.core.config import ROUTED, AdapterConfig, Method
from remix_cli.core.patch import TargetError
from remix_cli.diagnostics.parameters import count_parameters
from remix_cli.errors import RecipeError
from remix_cli.methods.apply import apply_method
from remix_cli.models import skeleton
from remix_cli.recipe import Recipe
from remix_cli.recipe.methods import METHODS
from remix_cli.recipe.schema import Adapter as AdapterRecipe

Count = Literal["trained", "active"]
MOST = 4  # times the base model: beyond any adapter; some methods take real memory to be counted
KNOBS = {"prefix": "virtual_tokens", "prompt": "virtual_tokens", "p_tuning": "virtual_tokens", "vblora": "vectors"}


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
    if target > MOST * own["base"]:
        raise RecipeError(
            f"--parameters: {target:,} are more than four times the model itself ({own['base']:,}); give fewer"
        )
    sizes = []
    for method, facts in METHODS.items():
        if method == "none":
            continue
        usual = KNOBS.get(method, "rank" if "rank" in facts.settings else "")
        for knob in ("rank", "pool_size") if method in ROUTED else (usual,):
            sizes.append(_solve(recipe, method, knob, target, what))
    return target, sizes


def _solve(recipe: Recipe, method: Method, knob: str, target: int, what: Count) -> Sized:
    config = _config(recipe, method)
    kept = "" if method not in ROUTED else f"r={config.rank}" if knob == "pool_size" else f"n={config.pool_size}"
    if method in ("remix", "mixlora"):
        kept += f" k={config.active}"
    try:
        if not knob:
            counts = _count(recipe, config)
            return Sized(method, "", 0, counts["trained"], counts["active"], kept)
        # the smallest sizes that exist: a pool holds its k active LoRAs, a rank is 1
        low = max(1, config.active) if knob == "pool_size" and method != "hydralora" else 1
        small, large = (_count(recipe, _with(config, knob, low + i))[what] for i in (0, 1))
        value = low if large == small else max(low, low + round((target - small) / (large - small)))
        counts = _count(recipe, _with(config, knob, value))
        return Sized(method, knob, value, counts["trained"], counts["active"], kept)
    except TargetError as error:
        return Sized(method, knob, 0, 0, 0, kept, str(error))


def _config(recipe: Recipe, method: Method) -> AdapterConfig:
    """The method with those of the recipe's adapter settings that it reads, its own defaults otherwise."""
    facts = METHODS[method]
    if recipe.adapter.method == method:
        return recipe.adapter_config()
    given = {key: getattr(recipe.adapter, key) for key in facts.settings}
    if "active" in given:
        given["active"] = min(given["active"], given["pool_size"])
    adapter = AdapterRecipe.model_validate({"method": method} | given | facts.adapter)
    router = recipe.router.model_copy(update={"scope": facts.router.get("scope", "block")})
    return recipe.model_copy(update={"adapter": adapter, "router": router}).adapter_config()


def _with(config: AdapterConfig, knob: str, value: int) -> AdapterConfig:
    changed = config.to_dict() | {knob: value}
    if config.shares_a and knob == "pool_size":
        changed["active"] = value
    return AdapterConfig.from_dict(changed)


def _count(recipe: Recipe, config: AdapterConfig) -> dict[str, int]:
    return count_parameters(apply_method(skeleton(recipe.model), config, seed=0)).to_dict()
