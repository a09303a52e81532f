"""ReMix over a layer's modules: one LoRA on each linear, of which the prompt chooses k, at one constant weight."""

from typing import ClassVar

from remix_cli.core.config import POOLS
from remix_cli.methods.base import LINEARS
from remix_cli.methods.milora import OF_A_LAYER, MiLora
from remix_cli.methods.pooled import ROUTER, Pooled


class RemixModules(Pooled):
    summary = "MiLoRA's choice with ReMix's constant weight, router fixed or by policy gradient"
    title = "ReMix over modules"
    settings = ("active", "omega", *LINEARS, "train_loras")
    router_settings = (
        *("fixed", "clusters", "selections", "estimator", "lora_gradient"),
        *(key for key in ROUTER if key != "scope"),
    )
    adapter_defaults: ClassVar = {"target_modules": OF_A_LAYER, "active": 3}
    router_defaults: ClassVar = {"level": "sequence"}
    pool = POOLS["remix_modules"]
    not_with = MiLora.not_with
    unexported = MiLora.unexported
