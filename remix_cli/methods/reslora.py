"""ResLoRA: a LoRA for each linear, joined to those of the layers before it while it is trained (core/residual.py)."""

from typing import ClassVar

from remix_cli.core.config import POOLS, Shortcut
from remix_cli.methods.base import LINEARS, Count
from remix_cli.methods.pooled import Pooled
from remix_cli.own_settings import Setting

ALONE = "a layer that is repeated alone has nothing handed to it by the one before"


class ResLora(Pooled):
    summary = "one LoRA, with paths to those of the layers before (arXiv 2402.18039)"
    title = "ResLoRA"
    own_settings: ClassVar = {
        "shortcut": Setting(
            Shortcut,
            "middle",
            "what a layer is given of the ones before: their inputs, their whole LoRAs, or what their A make.",
        ),
        "previous": Setting(Count, 1, "so many layers back."),
    }
    settings = (*LINEARS, *own_settings)
    learning_rate = 1e-3
    constants: ClassVar = {"omega": "rslora"}
    pool = POOLS["reslora"]
    exports = ("merged",)
    unexported = "has paths between layers, which PEFT cannot hold"
    not_with: ClassVar = {
        "gradient_checkpointing": ALONE,
        "shard_base": "sharding was tried with LoRAs that stand alone",
    }
