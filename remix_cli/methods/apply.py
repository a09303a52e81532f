"""From a config to an adapter in place, whatever the method."""

from torch import nn

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import Adapter
from remix_cli.methods.registry import method_named


def apply_method(model: nn.Module, config: AdapterConfig, *, seed: int) -> Adapter:
    """Freeze `model` and put the method of `config` on it; run `.model` of what is returned.

    Whatever is random is drawn from `seed` alone. Raises TargetError if a target matches nothing or does not suit
    the method, RecipeError if PEFT is needed and missing.
    """
    return method_named(config.method).build(model, config, seed)


def unadapted(model: nn.Module) -> Adapter:
    """An adapter that is none: the model as it is."""
    return apply_method(model, AdapterConfig(method="none", pool_size=1, active=1), seed=0)
