"""DoRA: one LoRA for the direction of a weight, and a trained length for each of its rows."""

from typing import Any, ClassVar

from remix_cli.compat.peft import loses_scales
from remix_cli.core.config import AdapterConfig, Sizes
from remix_cli.errors import RecipeError
from remix_cli.methods.base import LINEARS
from remix_cli.methods.peft_base import PeftMethod, on_targets
from remix_cli.own_settings import Setting


class Dora(PeftMethod):
    summary = "one LoRA for the direction of W and a length for each row (arXiv 2402.09353)"
    own_settings: ClassVar = {"use_rslora": Setting(bool, False, "scale by 2/sqrt(r), as rsLoRA does, instead of 2/r.")}
    settings = (*LINEARS, *own_settings)
    learning_rate = 3e-3
    sizes = ("rank",)

    def describe(self, peft: Any, model: Any, config: AdapterConfig) -> Any:
        if loses_scales(model):
            raise RecipeError(
                "adapter.method: dora on an 8-bit base needs a GPU; set model.quantization to 4bit or none here"
            )
        targets = on_targets(model, config)
        return peft.LoraConfig(
            **targets,
            r=config.rank,
            lora_alpha=2,
            lora_dropout=config.dropout,
            use_dora=True,
            use_rslora=config.settings.get("use_rslora", False),  # folders older than the key have none
        )

    def tensor_sizes(self, config: AdapterConfig) -> Sizes:
        return {".lora_A.weight": (config.rank, None), ".lora_B.weight": (None, config.rank)}
