"""P-tuning: embeddings in front of the sequence, made by a small trained network."""

from typing import Any

from remix_cli.core.config import AdapterConfig
from remix_cli.methods.virtual import InFront, in_front


class PTuning(InFront):
    summary = "the same, made by a small network (arXiv 2103.10385)"

    def describe(self, peft: Any, model: Any, config: AdapterConfig) -> Any:
        hidden = model.config.get_text_config().hidden_size
        return peft.PromptEncoderConfig(**in_front(config), encoder_hidden_size=hidden)
