"""remix inside other people's tools: one object in PEFT's manner, trainers for transformers and TRL.

model.py        get_remix_model, RemixModel: adapters on a transformers model; save, load, disable, switch
trainer.py      RemixTrainer: transformers.Trainer and its subclasses
sft_trainer.py  RemixSFTTrainer: the same for TRL's SFTTrainer
axolotl.py      RemixPlugin: a plug-in of axolotl's, imported by it alone

The names below may be imported from here.
"""

from typing import TYPE_CHECKING, Any

from remix_cli.core.config import AdapterConfig
from remix_cli.integrations.model import RemixModel, get_remix_model
from remix_cli.integrations.trainer import RemixTrainer, RouterTraining

if TYPE_CHECKING:
    from remix_cli.integrations.sft_trainer import RemixSFTTrainer

__all__ = ["AdapterConfig", "RemixModel", "RemixSFTTrainer", "RemixTrainer", "RouterTraining", "get_remix_model"]


def __getattr__(name: str) -> Any:
    """The one that needs TRL, which need not be there."""
    if name != "RemixSFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from remix_cli.integrations.sft_trainer import RemixSFTTrainer

    return RemixSFTTrainer
