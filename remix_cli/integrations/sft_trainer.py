"""Train a routed adapter with TRL's SFTTrainer."""

from trl import SFTTrainer

from remix_cli.integrations.trainer import RemixTrainer


class RemixSFTTrainer(RemixTrainer, SFTTrainer):
    """trl.SFTTrainer for a RemixModel. All its arguments but `model` and `router` are the SFTTrainer's.

    Entropy and accuracy by token, which SFTTrainer logs while it trains, are measured at evaluations only.
    """
