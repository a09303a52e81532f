"""Prefix tuning: trained keys and values in front of the sequence, in every layer."""

from typing import Any, ClassVar

from remix_cli.core.config import AdapterConfig
from remix_cli.methods.virtual import InFront, in_front


class Prefix(InFront):
    summary = "trained keys and values in front, in every layer (arXiv 2101.00190)"
    learning_rate = 1e-2
    not_with: ClassVar = InFront.not_with | {
        "gradient_checkpointing": "a recomputed layer would find its prefix in the cache already"
    }

    def describe(self, peft: Any, model: Any, config: AdapterConfig) -> Any:
        return peft.PrefixTuningConfig(**in_front(config))
