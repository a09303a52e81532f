"""Prompt tuning: trained embeddings in front of the sequence."""

from typing import Any

from remix_cli.core.config import AdapterConfig
from remix_cli.methods.virtual import InFront, in_front


class Prompt(InFront):
    summary = "trained embeddings in front of the sequence (arXiv 2104.08691)"
    learning_rate = 3e-2

    def describe(self, peft: Any, model: Any, config: AdapterConfig) -> Any:
        return peft.PromptTuningConfig(**in_front(config))

    def start(self, model: Any, wrapped: Any) -> None:
        """At embeddings of random tokens, which the authors found better than random vectors."""
        import torch

        vocabulary = model.get_input_embeddings().weight
        vectors = wrapped.prompt_encoder["default"].embedding.weight
        if vectors.device.type != "meta":
            rows = torch.randint(len(vocabulary), (len(vectors),)).to(vocabulary.device)
            with torch.no_grad():
                vectors.copy_(vocabulary[rows])
