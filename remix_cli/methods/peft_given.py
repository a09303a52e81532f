"""A PEFT adapter of anyone's, read from its folder, behind the interface of ours: to be evaluated, not trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from remix_cli.compat.peft import no_deprecations, without_bitsandbytes
from remix_cli.core.config import AdapterConfig
from remix_cli.core.lora_folder import PEFT_WEIGHTS
from remix_cli.core.patch import Adapter
from remix_cli.errors import ArtefactError, RecipeError, shortened


class GivenPeft(Adapter):
    """Raises RecipeError without PEFT, ArtefactError for what it cannot read or what sits in front of a sequence."""

    def __init__(self, model: nn.Module, folder: Path):
        if not (folder / PEFT_WEIGHTS).is_file():
            raise ArtefactError(f"{folder / PEFT_WEIGHTS}: missing; pickled weights (.bin) are not read: save it again")
        try:
            with without_bitsandbytes():
                import peft
        except ImportError:
            raise RecipeError(
                f"{folder}: a PEFT adapter, and PEFT is not installed; pip install 'remix-cli[peft]'"
            ) from None
        try:
            with without_bitsandbytes(), no_deprecations():
                described = peft.PeftConfig.from_pretrained(str(folder))
                if not described.is_prompt_learning:
                    self.wrapped: Any = peft.PeftModel.from_pretrained(model, str(folder))
        except Exception as error:  # of whatever PEFT makes of the file
            said = shortened(f"{type(error).__name__}: {error}", 160)
            raise ArtefactError(f"{folder}: PEFT cannot put this adapter on its base model: {said}") from None
        kind = str(getattr(described.peft_type, "value", described.peft_type)).lower()
        if described.is_prompt_learning:
            raise ArtefactError(
                f"{folder}: peft_type {kind} puts vectors in front of a sequence, which is not read from a folder; "
                "evaluate the run that it was exported from"
            )
        super().__init__(model, AdapterConfig(method=f"peft-{kind}", pool_size=1, active=1))
        model.requires_grad_(False).eval()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.wrapped.disable_adapter():
            yield
