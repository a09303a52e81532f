"""HydraLoRA: n matrices B for one shared A, all of them weighted by a softmax."""

from typing import ClassVar

from remix_cli.core.config import POOLS
from remix_cli.methods.base import LINEARS
from remix_cli.methods.mixlora import MixLora
from remix_cli.methods.pooled import AS_PUBLISHED, ROUTER, Pooled


class HydraLora(Pooled):
    summary = "n matrices B for one shared A, all weighted by a softmax (arXiv 2404.19245)"
    settings = ("pool_size", "omega", *LINEARS)
    router_settings = ROUTER
    router_defaults: ClassVar = AS_PUBLISHED | {"scope": "module"}
    router_rate_follows = True
    pool = POOLS["hydralora"]
    sizes = ("rank", "pool_size")
    unexported = MixLora.unexported
