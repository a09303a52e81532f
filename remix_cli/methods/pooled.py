"""What the methods have in common that train a pool of LoRAs of the library's own (core/layer.py)."""

from typing import TYPE_CHECKING, ClassVar

from remix_cli.core.config import AdapterConfig
from remix_cli.methods.base import LINEARS, Method

if TYPE_CHECKING:
    from torch import nn

    from remix_cli.core.patch import Adapter

ROUTER = ("scope", "level", "learning_rate", "init_std", "unit_input", "max_grad_norm")  # what every router reads
AS_PUBLISHED = {"unit_input": False}  # of routers that read x as it is


class Pooled(Method):
    settings: ClassVar[tuple[str, ...]] = LINEARS
    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    def build(self, model: "nn.Module", config: AdapterConfig, seed: int) -> "Adapter":
        from remix_cli.core.patch import apply_adapter

        return apply_adapter(model, config, seed=seed)
