"""What the methods have in common that put trained vectors, `virtual_tokens` of them, in front of every sequence."""

from typing import Any, ClassVar

from remix_cli.core.config import AdapterConfig, Sizes
from remix_cli.methods.base import Count
from remix_cli.methods.peft_base import PeftMethod
from remix_cli.own_settings import Setting


class InFront(PeftMethod):
    own_settings: ClassVar = {"virtual_tokens": Setting(Count, 20, "trained vectors in front of every sequence.")}
    settings: ClassVar[tuple[str, ...]] = (*own_settings,)
    in_front = True
    sizes: ClassVar[tuple[str, ...]] = ("virtual_tokens",)
    not_with: ClassVar = PeftMethod.not_with | {
        "cuda_graphs": "PEFT copies its virtual tokens from the host in every pass"
    }

    def tensor_sizes(self, config: AdapterConfig) -> Sizes:
        return {"embedding.weight": (config.virtual_tokens, None)}


def in_front(config: AdapterConfig) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", "num_virtual_tokens": config.virtual_tokens}
