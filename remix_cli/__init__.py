"""ReMix: finetune language models with reinforcement-routed mixtures of LoRAs (arXiv 2603.10160)."""

__version__ = "0.1.0"
