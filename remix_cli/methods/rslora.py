"""rsLoRA: LoRA with a scale that keeps the size of its update as the rank grows."""

from typing import ClassVar

from remix_cli.core.config import POOLS
from remix_cli.methods.pooled import Pooled


class RsLora(Pooled):
    summary = "one LoRA, scaled by 2/sqrt(r) (arXiv 2312.03732)"
    constants: ClassVar = {"omega": "rslora"}
    pool = POOLS["rslora"]
    exports = ("peft", "merged")
