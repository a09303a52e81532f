"""VB-LoRA: LoRAs put together from the vectors of one bank, which trained logits choose."""

from typing import Any, ClassVar

from remix_cli.core.config import AdapterConfig, Sizes
from remix_cli.methods.base import LINEARS, Count
from remix_cli.methods.peft_base import PeftMethod, on_targets
from remix_cli.own_settings import Setting


class VbLora(PeftMethod):
    """Its logits learn at a rate of their own as published, that of the router group."""

    summary = (
        "LoRAs put together from a shared bank of vectors (arXiv 2405.15179); the router group's rate is its logits'"
    )
    own_settings: ClassVar = {
        "vectors": Setting(Count, 256, "vectors in the bank."),
        "vector_length": Setting(Count, 64, "length of each; must divide the adapted layers' widths."),
    }
    settings = (*LINEARS, *own_settings)
    router_settings = ("learning_rate", "max_grad_norm")
    router_defaults: ClassVar = {"learning_rate": 1e-2}
    router_parameters = "vblora_logits"
    sizes = ("vectors",)
    not_with: ClassVar = PeftMethod.not_with | {"cuda_graphs": "PEFT's VB-LoRA waits for the device in every pass"}

    def describe(self, peft: Any, model: Any, config: AdapterConfig) -> Any:
        return peft.VBLoRAConfig(
            **on_targets(model, config),
            r=config.rank,
            num_vectors=config.vectors,
            vector_length=config.vector_length,
            vblora_dropout=config.dropout,
        )

    def tensor_sizes(self, config: AdapterConfig) -> Sizes:
        return {
            "vblora_vector_bank": (config.vectors, config.vector_length),
            "vblora_logits_A": (config.rank, None, config.vectors),
        }
