"""What a finetuning method declares of itself.

A method is a class, without state. Recipes, `budget`, exports and adapter folders go by its class attributes, and ask
for no method by its name. They are read without torch: `build` imports what it needs. Rates are for a model of a few
billion parameters; smaller models want more (docs/methods.md).
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from remix_cli.core.config import AdapterConfig, Pool, Sizes
from remix_cli.own_settings import Setting

if TYPE_CHECKING:
    from torch import nn

    from remix_cli.core.patch import Adapter

LINEARS = ("rank", "target_modules", "dropout")  # settings of LoRAs on linear layers
Count = Annotated[int, Field(ge=1)]


class Method(ABC):
    summary: ClassVar[str]  # one line, with the paper's arXiv id
    title: ClassVar[str] = ""  # in the heading of an exported folder; by default its name
    own_settings: ClassVar[dict[str, Setting]] = {}  # in `AdapterConfig.settings`, unless that has a field of the name
    settings: ClassVar[tuple[str, ...]] = ()  # keys of the recipe's `adapter` that it reads, its own among them
    router_settings: ClassVar[tuple[str, ...]] = ()  # and of `router`
    learning_rate: ClassVar[float] = 1e-3  # where the recipe does not say
    adapter_defaults: ClassVar[dict[str, Any]] = {}  # of `adapter`, where they are not the schema's
    router_defaults: ClassVar[dict[str, Any]] = {}  # and of `router`
    router_rate_follows: ClassVar[bool] = False  # the router's rate is by default train.learning_rate
    constants: ClassVar[dict[str, Any]] = {}  # fields of AdapterConfig that no recipe chooses
    pool: ClassVar[Pool | None] = None  # how its pool of LoRAs works, if that is what it trains
    trains: ClassVar[bool] = True
    in_front: ClassVar[bool] = False  # puts `virtual_tokens` trained vectors in front of every sequence
    sizes: ClassVar[tuple[str, ...]] = ()  # settings that `budget` solves for; each count of parameters affine in them
    exports: ClassVar[tuple[str, ...]] = ()  # the formats of `remix export` that can hold it
    unexported: ClassVar[str] = "has no pool"  # why the others cannot
    not_with: ClassVar[dict[str, str]] = {}  # switches of `train` that it cannot be combined with, each with the reason

    @abstractmethod
    def build(self, model: "nn.Module", config: AdapterConfig, seed: int) -> "Adapter":
        """Freeze `model` and put the adapter on it; whatever is random is drawn from `seed` alone.

        Raises TargetError if a target matches nothing or does not suit the method, RecipeError for what is missing.
        """

    def tensor_sizes(self, config: AdapterConfig) -> Sizes:
        """Which sizes of the adapter's tensors `config` decides; a folder whose tensors have others is refused."""
        return config.tensor_sizes()
