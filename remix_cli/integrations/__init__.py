"""remix inside other people's tools: one object in PEFT's manner, trainers for transformers and TRL.

model.py        get_remix_model, RemixModel: adapters on a transformers model; save, load, disable, switch
trainer.py      RemixTrainer: transformers.Trainer and its subclasses
sft_trainer.py  RemixSFTTrainer: the same for TRL's SFTTrainer

The names below may be imported from here.
"""

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remix_cli.core.config import AdapterConfig as AdapterConfig
    from remix_cli.integrations.model import RemixModel as RemixModel
    from remix_cli.integrations.model import get_remix_model as get_remix_model
    from remix_cli.integrations.sft_trainer import RemixSFTTrainer as RemixSFTTrainer
    from remix_cli.integrations.trainer import RemixTrainer as RemixTrainer
    from remix_cli.integrations.trainer import RouterTraining as RouterTraining

# Found when they are asked for: TRL need not be there.
_PUBLIC = {
    "AdapterConfig": "core.config",
    "RemixModel": "integrations.model",
    "get_remix_model": "integrations.model",
    "RemixTrainer": "integrations.trainer",
    "RouterTraining": "integrations.trainer",
    "RemixSFTTrainer": "integrations.sft_trainer",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(f"remix_cli.{_PUBLIC[name]}:{name}")
