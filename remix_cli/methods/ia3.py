"""(IA)^3: a trained factor for every key, value and inner activation of the feed-forward layers."""

from typing import Any, ClassVar

from remix_cli.core.config import AdapterConfig
from remix_cli.methods.peft_base import PeftMethod, on_targets


class Ia3(PeftMethod):
    summary = "a factor for every key, value and inner activation (arXiv 2205.05638)"
    settings = ("target_modules",)
    learning_rate = 3e-3
    adapter_defaults: ClassVar = {"target_modules": ["k_proj", "v_proj", "down_proj"]}

    def describe(self, peft: Any, model: Any, config: AdapterConfig) -> Any:
        from remix_cli.core.patch import TargetError

        described = on_targets(model, config)
        inner = getattr(model.config.get_text_config(), "intermediate_size", None)
        if inner is None:
            raise TargetError("ia3: the model's config does not tell its feed-forward layers (no intermediate_size)")
        widths = {name: model.get_submodule(name).in_features for name in described["target_modules"]}
        feed_forward = [name for name, width in widths.items() if width == inner]
        return peft.IA3Config(**described, feedforward_modules=feed_forward)
