"""What the methods have in common that PEFT computes."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from remix_cli.core.config import AdapterConfig
from remix_cli.methods.base import Method

if TYPE_CHECKING:
    from torch import nn

    from remix_cli.core.patch import Adapter


class PeftMethod(Method):
    """One of PEFT's: give `describe`, and `start` where it does not begin as PEFT has it."""

    exports: ClassVar[tuple[str, ...]] = ("peft",)
    not_with: ClassVar = {"shard_base": "sharding was tried with LoRAs of ours alone"}
    router_parameters = ""  # a part of the names of those that learn at the router group's rate

    @abstractmethod
    def describe(self, peft: Any, model: "nn.Module", config: AdapterConfig) -> Any:
        """The method in the words of PEFT, the module `peft`. Raises TargetError, RecipeError."""

    def start(self, model: Any, wrapped: Any) -> None:
        """Change the first values of the PEFT model `wrapped` on `model`; random numbers come from the seed."""

    def build(self, model: "nn.Module", config: AdapterConfig, seed: int) -> "Adapter":
        from remix_cli.methods.peft_adapter import PeftAdapter

        return PeftAdapter(model, config, seed, self)


def on_targets(model: "nn.Module", config: AdapterConfig) -> dict[str, Any]:
    """What all that sit inside a causal language model are described by: exactly the linears that we find."""
    from remix_cli.core.patch import find_targets

    return {"task_type": "CAUSAL_LM", "target_modules": find_targets(model, config.target_modules)}
