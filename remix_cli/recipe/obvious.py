"""The comparison that a plain recipe stands for: does a pool of LoRAs pay on these rows, and a router that learns?

Arms from the simplest to train and to serve to the least simple, since of arms that nothing separates the first is
taken: one LoRA of the rank that serves a token (k r), one of the whole pool's (n r), the pool under a router that is
never trained, by token and by the prompt's cluster, and the pool with a router that learns; where there are tasks to
score, the base model, too. A recipe of another method stands in front of them. Each is tried at three learning rates.
"""

from typing import Any

from remix_cli.methods.registry import method_named
from remix_cli.recipe.loader import RawRecipe
from remix_cli.recipe.schema import HIGHEST_RATE, Recipe

Changes = dict[str, Any]  # dotted keys and their values
FACTOR = 3.0  # from one learning rate to the next: half an order of magnitude, as coarse as a first look may be
CLUSTERS = 32  # how many hardly matters (docs/results/skills.md)
SEEDS = 3  # the fewest that tell what training varies by with some confidence
POOL = {"pool_size": 8, "active": 4}
BESIDE = "-sweep"  # the sweep's folder is that of the recipe's own run, with this behind it


def make_obvious(raw: RawRecipe, recipe: Recipe) -> None:
    """Turn the plain recipe `raw`, which says `recipe`, into the sweep file that somebody would have written."""
    values = raw.values
    arms = _arms(recipe, values)
    rates = {name: _rates(recipe, changes) for name, changes in arms.items()}
    common = next(iter(rates.values()))
    train = values.setdefault("train", {})
    if all(tried == common for tried in rates.values()):
        train["learning_rate"] = common
    else:
        for name, tried in rates.items():
            arms[name] = arms[name] | ({"train.learning_rate": tried} if tried else {})
    values["output_dir"] = recipe.output_dir.rstrip("/") + BESIDE
    values["sweep"] = {"seeds": consecutive(recipe.seed, SEEDS), "arms": arms}
    values.pop("seed", None)


def consecutive(first: int, count: int) -> list[int]:
    return [first + i for i in range(count)]


def _arms(recipe: Recipe, values: dict[str, Any]) -> dict[str, Changes]:
    """Name -> what it changes of `recipe`, but for learning rates. `values`: what its file says."""
    own, given = recipe.adapter.method, values.get("adapter", {})
    pool, is_recipes = _pool(recipe, given)
    alike = {key: given[key] for key in ("target_modules", "dropout") if key in given}
    if recipe.method.pool is not None and "target_modules" in recipe.method.adapter_defaults:
        alike["target_modules"] = list(recipe.adapter.target_modules)  # else places would be compared, not methods
    n, k, r = pool["pool_size"], pool["active"], pool["rank"]
    arms: dict[str, Changes] = {}
    if own not in ("remix", "rslora"):
        arms[own] = {}
    for rank in dict.fromkeys((k * r, n * r)):
        arms[f"rsLoRA-r{rank}"] = {"adapter": {"method": "rslora", "rank": rank} | alike}
    if own == "rslora":  # at the rank that it has, which k r may miss by a few
        del arms[f"rsLoRA-r{k * r}"]
        arms = {f"rsLoRA-r{recipe.adapter.rank}": {}} | arms
    of_pool: Changes = {} if is_recipes else {"adapter": {"method": "remix", **pool} | alike}
    for name, router in _routers(recipe, chooses=k < n).items():
        arms[name] = of_pool | router
    if values.get("eval", {}).get("tasks") and recipe.method.trains:
        arms["base"] = {"adapter": {"method": "none"}}
    return arms


def _pool(recipe: Recipe, given: dict[str, Any]) -> tuple[dict[str, int], bool]:
    """n, k and r, and whether they are the recipe's own; else of the rank that its LoRA has, if it has one."""
    adapter = recipe.adapter
    if adapter.method == "remix":
        return {key: getattr(adapter, key) for key in ("pool_size", "active", "rank")}, True
    settings = recipe.method.settings
    if "pool_size" in settings:
        sizes = POOL | {key: given[key] for key in POOL if key in given}
        return sizes | {"active": min(sizes["active"], sizes["pool_size"]), "rank": adapter.rank}, False
    rank = adapter.rank // POOL["active"] if "rank" in settings else adapter.rank
    return POOL | {"rank": max(1, rank)}, False


def _routers(recipe: Recipe, chooses: bool) -> dict[str, Changes]:
    """What the arms of the pool change of the `router` group; one arm where every LoRA is always active."""
    if not chooses:
        return {"pool": {}}
    router = recipe.router
    by_token: Changes = {"router.fixed": True}
    if router.level != "token":
        by_token |= {"router.level": "token", "router.clusters": 0}
    by_cluster = {"router.fixed": True, "router.level": "sequence", "router.clusters": router.clusters or CLUSTERS}
    arms = {"fixed": by_token}
    if any(source.format != "text" for source in recipe.data.train):  # text has no prompts to tell apart
        arms["clusters"] = by_cluster
    # Said in full: what the recipe's method has by default is not in the file, and an arm's method has other defaults.
    if router.fixed and router.level == "sequence" and not router.clusters:
        arms["by-prompt"] = {"router.fixed": True, "router.level": "sequence"}
    arms["ReMix"] = {"router.fixed": False, "router.level": router.level}
    return arms


def _rates(recipe: Recipe, changes: Changes) -> list[float]:
    """A third of the recipe's learning rate, the rate and three times as much, as far as the methods' defaults are
    apart; none for a method that is not trained."""
    method = method_named(changes["adapter"]["method"]) if "adapter" in changes else recipe.method
    if not method.trains:
        return []
    middle = recipe.train.learning_rate * method.learning_rate / recipe.method.learning_rate
    rates = [min(HIGHEST_RATE, float(f"{rate:.3g}")) for rate in (middle / FACTOR, middle, middle * FACTOR)]
    return list(dict.fromkeys(rates))
