"""What a method makes of a recipe: defaults where it is silent, and which keys of `router` a run does not read."""

from typing import TYPE_CHECKING, Any

from remix_cli.core.config import AdapterConfig
from remix_cli.core.estimators.registry import ESTIMATORS
from remix_cli.methods.registry import METHODS, method_named

if TYPE_CHECKING:
    from remix_cli.methods.base import Method
    from remix_cli.recipe.schema import Router

OF_TRAINING = ("selections", "estimator", "lora_gradient", "learning_rate", "max_grad_norm")  # keys of `router`


def fill_defaults(values: Any) -> Any:
    """A recipe's raw mapping with the method's own defaults where it is silent; anything malformed as it came."""
    if not isinstance(values, dict):
        return values
    groups = {name: values.get(name, {}) for name in ("adapter", "router", "train")}
    if not all(isinstance(group, dict) for group in groups.values()):
        return values
    name = groups["adapter"].get("method", "remix")
    if not isinstance(name, str) or name not in METHODS:
        return values
    method = method_named(name)
    adapter = method.adapter_defaults | groups["adapter"]
    train = {"learning_rate": method.learning_rate} | groups["train"]
    usual = dict(method.router_defaults)
    if method.router_rate_follows:
        usual["learning_rate"] = train["learning_rate"]
    if "fixed" in method.router_settings and _chooses(method, adapter):
        usual["fixed"] = not _says_training(adapter, groups["router"])
    return values | {"adapter": adapter, "router": usual | groups["router"], "train": train}


def _chooses(method: "Method", adapter: dict[str, Any]) -> bool:
    """Are there LoRAs to choose between?"""
    n, k = (adapter.get(key, getattr(AdapterConfig, key)) for key in ("pool_size", "active"))
    if method.pool is not None and method.pool.of_modules:
        n = len(adapter["target_modules"])
    return n != k


def _says_training(adapter: dict[str, Any], router: dict[str, Any]) -> bool:
    """Is the router to learn, as far as these groups of a recipe say? One that nothing is said of is left alone, for
    training it has not paid so far (docs/results/skills.md); with frozen LoRAs there is nothing else to train."""
    return adapter.get("train_loras") is False or any(key in router for key in OF_TRAINING)


def unread_of_router(name: str, router: "Router") -> dict[str, str]:
    """Keys of `router` that a run by the method `name` does not read with these settings, each with the reason."""
    read = method_named(name).router_settings
    unread = {key: f"does nothing for adapter.method {name}" for key in type(router).model_fields if key not in read}
    if "selections" in unread:  # the rest is of routers that sample
        return unread
    if router.level != "sequence":
        unread["clusters"] = "counts clusters of prompts, and needs router.level: sequence"
    elif router.clusters:
        unread["unit_input"] = "scales what the router reads, and a cluster's centre has unit length"
    if router.fixed:
        return unread | dict.fromkeys(OF_TRAINING, "says how the router is trained, and router.fixed is true")
    if router.lora_gradient == "top" and not ESTIMATORS[router.estimator].samples_beside_top:
        unread["selections"] = f"counts samples, and {router.estimator} with lora_gradient: top draws none"
    return unread


def idle_in_router(name: str, all_active: bool, router: "Router") -> dict[str, str]:
    """Further keys of the `router` group that change nothing, each with the reason; run folders do hold them."""
    idle: dict[str, str] = {}
    if all_active and "selections" in method_named(name).router_settings:
        reason = "says how a choice is learnt, and with adapter.active = adapter.pool_size there is none"
        return dict.fromkeys(("fixed", *OF_TRAINING), reason)
    if all_active:  # the shares that the loss compares are equal whatever the router does
        idle["balance"] = "evens out a choice, and with adapter.active = adapter.pool_size there is none"
    if router.learning_rate == 0:
        idle["max_grad_norm"] = "says how the router learns, and router.learning_rate is 0"
        if router.lora_gradient != "top":  # else the estimator says whether there are passes beside it
            idle["estimator"] = idle["max_grad_norm"]
    return idle
