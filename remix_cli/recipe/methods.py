"""What `adapter.method` may name: which settings each method reads, and what it takes where the recipe is silent.

Rates are for a model of a few billion parameters; smaller models want more (docs/methods.md).
"""

from dataclasses import dataclass, field
from typing import Any

from remix_cli.core.config import Method
from remix_cli.core.estimators.registry import ESTIMATORS

LINEARS = ("rank", "target_modules", "dropout")
POOL = ("pool_size", "active", "omega", *LINEARS)
SOFT_ROUTER = ("scope", "level", "learning_rate", "init_std", "unit_input", "max_grad_norm")
SAMPLED_ROUTER = ("fixed", "clusters", "selections", "estimator", "lora_gradient", *SOFT_ROUTER)
ROUTER = (*SAMPLED_ROUTER, "balance")
PROMPTS = ("prefix", "prompt", "p_tuning")  # methods that put trained vectors in front of the sequence


@dataclass(frozen=True)
class MethodFacts:
    summary: str
    settings: tuple[str, ...]  # keys of `adapter` that it reads
    router_settings: tuple[str, ...] = ()  # keys of `router` that it reads
    learning_rate: float = 1e-3
    router: dict[str, Any] = field(default_factory=dict)  # defaults of the `router` group
    adapter: dict[str, Any] = field(default_factory=dict)  # defaults of the `adapter` group
    peft: bool = False  # needs the extra of that name
    soft: bool = False  # its router is trained with the LoRAs and, as published, at their rate


AS_PUBLISHED = {"unit_input": False}

METHODS: dict[Method, MethodFacts] = {
    "remix": MethodFacts(
        "k of n LoRAs with one constant weight, router by policy gradient (arXiv 2603.10160)", POOL, SAMPLED_ROUTER
    ),
    "mixlora": MethodFacts(
        "top k of n LoRAs by a renormalised softmax, with a load balance loss (arXiv 2404.15159)",
        POOL,
        (*SOFT_ROUTER, "balance"),
        router=AS_PUBLISHED | {"balance": 0.01},
        soft=True,
    ),
    "hydralora": MethodFacts(
        "n matrices B for one shared A, all weighted by a softmax (arXiv 2404.19245)",
        tuple(key for key in POOL if key != "active"),
        SOFT_ROUTER,
        router=AS_PUBLISHED | {"scope": "module"},
        soft=True,
    ),
    "lora": MethodFacts("one LoRA, scaled by 2/r (arXiv 2106.09685)", LINEARS, learning_rate=3e-3),
    "rslora": MethodFacts("one LoRA, scaled by 2/sqrt(r) (arXiv 2312.03732)", LINEARS),
    "dora": MethodFacts(
        "one LoRA for the direction of W and a length for each row (arXiv 2402.09353)",
        LINEARS,
        learning_rate=3e-3,
        peft=True,
    ),
    "ia3": MethodFacts(
        "a factor for every key, value and inner activation (arXiv 2205.05638)",
        ("target_modules",),
        learning_rate=3e-3,
        adapter={"target_modules": ["k_proj", "v_proj", "down_proj"]},
        peft=True,
    ),
    "vblora": MethodFacts(
        "LoRAs put together from a shared bank of vectors (arXiv 2405.15179); the router group's rate is its logits'",
        (*LINEARS, "vectors", "vector_length"),
        ("learning_rate", "max_grad_norm"),
        router={"learning_rate": 1e-2},
        peft=True,
    ),
    "prefix": MethodFacts(
        "trained keys and values in front, in every layer (arXiv 2101.00190)",
        ("virtual_tokens",),
        learning_rate=1e-2,
        peft=True,
    ),
    "prompt": MethodFacts(
        "trained embeddings in front of the sequence (arXiv 2104.08691)",
        ("virtual_tokens",),
        learning_rate=3e-2,
        peft=True,
    ),
    "p_tuning": MethodFacts("the same, made by a small network (arXiv 2103.10385)", ("virtual_tokens",), peft=True),
    "none": MethodFacts("the base model: zero-shot, or few-shot with `shots` of an evaluation task", ()),
}


def unread_of_router(method: str, router: Any) -> dict[str, str]:
    """Keys of the group `router` (schema.Router) that a run with these settings does not read, each with the reason."""
    facts = METHODS[method]  # type: ignore[index]
    unread = {key: f"does nothing for adapter.method {method}" for key in ROUTER if key not in facts.router_settings}
    if "fixed" in unread:
        return unread
    if router.level != "sequence":
        unread["clusters"] = "counts clusters of prompts, and needs router.level: sequence"
    elif router.clusters:
        unread["unit_input"] = "scales what the router reads, and a cluster's centre has unit length"
    if router.fixed:
        trained = ("selections", "estimator", "lora_gradient", "learning_rate", "max_grad_norm")
        return unread | dict.fromkeys(trained, "says how the router is trained, and router.fixed is true")
    if router.lora_gradient == "top" and not ESTIMATORS[router.estimator].samples_beside_top:
        unread["selections"] = f"counts samples, and {router.estimator} with lora_gradient: top draws none"
    return unread


def idle_in_router(method: str, all_active: bool, router: Any) -> dict[str, str]:
    """Further keys of the `router` group that change nothing, each with the reason; run folders do hold them."""
    idle: dict[str, str] = {}
    if all_active and method == "remix":
        keys = ("fixed", "selections", "estimator", "lora_gradient", "learning_rate", "max_grad_norm")
        reason = "says how a choice is learnt, and with adapter.active = adapter.pool_size there is none"
        return dict.fromkeys(keys, reason)
    if all_active:  # the shares that the loss compares are equal whatever the router does
        idle["balance"] = "evens out a choice, and with adapter.active = adapter.pool_size there is none"
    if router.learning_rate == 0:
        idle["max_grad_norm"] = "says how the router learns, and router.learning_rate is 0"
        if router.lora_gradient != "top":  # else the estimator says whether there are passes beside it
            idle["estimator"] = idle["max_grad_norm"]
    return idle


def fill_defaults(values: Any) -> Any:
    """A recipe's raw mapping with the method's own defaults where it is silent; anything malformed as it came."""
    if not isinstance(values, dict):
        return values
    groups = {name: values.get(name, {}) for name in ("adapter", "router", "train")}
    if not all(isinstance(group, dict) for group in groups.values()):
        return values
    method = groups["adapter"].get("method", "remix")
    facts = METHODS.get(method) if isinstance(method, str) else None  # type: ignore[call-overload]
    if facts is None:
        return values
    train = {"learning_rate": facts.learning_rate} | groups["train"]
    tied = {"learning_rate": train["learning_rate"]} if facts.soft else {}
    router = facts.router | tied | groups["router"]
    return values | {"adapter": facts.adapter | groups["adapter"], "router": router, "train": train}
