"""MixLoRA: the top k of n LoRAs by a renormalised softmax, with a load balance loss."""

from typing import ClassVar

from remix_cli.core.config import POOLS
from remix_cli.methods.base import LINEARS
from remix_cli.methods.pooled import AS_PUBLISHED, ROUTER, Pooled


class MixLora(Pooled):
    summary = "top k of n LoRAs by a renormalised softmax, with a load balance loss (arXiv 2404.15159)"
    settings = ("pool_size", "active", "omega", *LINEARS)
    router_settings = (*ROUTER, "balance")
    router_defaults: ClassVar = AS_PUBLISHED | {"balance": 0.01}
    router_rate_follows = True
    pool = POOLS["mixlora"]
    sizes = ("rank", "pool_size")
    unexported = "weights its LoRAs by a softmax"
