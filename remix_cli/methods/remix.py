"""ReMix: k of n LoRAs with one constant weight, the router trained by policy gradient."""

from remix_cli.core.config import POOLS
from remix_cli.methods.base import LINEARS
from remix_cli.methods.pooled import ROUTER, Pooled


class Remix(Pooled):
    summary = "k of n LoRAs with one constant weight, router fixed or by policy gradient (arXiv 2603.10160)"
    title = "ReMix"
    settings = ("pool_size", "active", "omega", *LINEARS, "train_loras")
    router_settings = ("fixed", "clusters", "selections", "estimator", "lora_gradient", *ROUTER)
    pool = POOLS["remix"]
    sizes = ("rank", "pool_size")
    exports = ("hf", "merged", "peft-merged", "peft-experts")
    unexported = "has a router, which PEFT cannot hold"
