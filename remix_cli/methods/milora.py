"""MiLoRA: the LoRAs of a layer's linears are its pool, and the prompt says once which of them are on."""

from typing import ClassVar

from remix_cli.core.config import POOLS
from remix_cli.methods.base import LINEARS
from remix_cli.methods.pooled import AS_PUBLISHED, ROUTER, Pooled

OF_A_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class MiLora(Pooled):
    """A softmax over the chosen modules, as published, with a load balance loss; docs/methods.md has what is open."""

    summary = "the prompt chooses k of a layer's LoRA modules by a softmax (arXiv 2410.18035)"
    title = "MiLoRA"
    settings = ("active", "omega", *LINEARS)
    router_settings = (*(key for key in ROUTER if key != "scope"), "balance")
    adapter_defaults: ClassVar = {"target_modules": OF_A_LAYER, "active": 3}
    router_defaults: ClassVar = AS_PUBLISHED | {"level": "sequence", "balance": 0.01}
    router_rate_follows = True
    pool = POOLS["milora"]
    not_with: ClassVar = {"shard_base": "sharding was tried with routers inside of layers alone"}
    unexported = "chooses among a layer's modules, which nothing else reads"
