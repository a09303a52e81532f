"""LoRA: a product of two thin matrices beside each frozen linear layer."""

from typing import ClassVar

from remix_cli.core.config import POOLS
from remix_cli.methods.pooled import Pooled


class Lora(Pooled):
    summary = "one LoRA, scaled by 2/r (arXiv 2106.09685)"
    learning_rate = 3e-3
    constants: ClassVar = {"omega": "lora"}
    pool = POOLS["lora"]
    exports = ("peft", "merged")
