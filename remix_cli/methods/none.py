"""No finetuning: the base model, to compare with."""

from typing import TYPE_CHECKING, ClassVar

from remix_cli.core.config import AdapterConfig
from remix_cli.methods.base import Method

if TYPE_CHECKING:
    from torch import nn

    from remix_cli.core.patch import Adapter


class Nothing(Method):
    summary = "the base model: zero-shot, or few-shot with `shots` of an evaluation task"
    trains = False
    unexported = "has no adapter"
    not_with: ClassVar = {"shard_base": "nothing is trained"}

    def build(self, model: "nn.Module", config: AdapterConfig, seed: int) -> "Adapter":
        from remix_cli.core.patch import Adapter

        model.requires_grad_(False)
        return Adapter(model, config)
