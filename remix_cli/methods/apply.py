"""From a config to an adapter in place, whatever the method."""

from torch import nn

from remix_cli.core.config import POOLED, AdapterConfig
from remix_cli.core.patch import Adapter, apply_adapter


def apply_method(model: nn.Module, config: AdapterConfig, *, seed: int) -> Adapter:
    """Freeze `model` and put the method of `config` on it; run `.model` of what is returned.

    Whatever is random is drawn from `seed` alone. Raises TargetError if a target matches nothing or does not suit
    the method, RecipeError if PEFT is needed and missing.
    """
    if config.method in POOLED:
        return apply_adapter(model, config, seed=seed)
    if config.method == "none":
        model.requires_grad_(False)
        return Adapter(model, config)
    from remix_cli.methods.peft_adapter import PeftAdapter

    return PeftAdapter(model, config, seed)
