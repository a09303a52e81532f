"""PEFT: what it imports, what it draws from, what it says."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Context: PEFT does not find bitsandbytes, unless it has been imported before, as loading a quantised model does.

    PEFT looks whether a model is quantised by importing bitsandbytes wherever it is installed (import_utils.py,
    `is_bnb_4bit_available`, which every `get_peft_model` calls): seconds, and native libraries, for a run that
    quantises nothing. It remembers the answer for the life of the process, so that is forgotten afterwards: the next
    model may be quantised. Seen with PEFT 0.21; https://github.com/huggingface/peft/pull/1230 delayed the import to
    this place.
    """
    if "bitsandbytes" in sys.modules:
        yield
    else:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules["bitsandbytes"]
    remembering = sys.modules.get("peft.import_utils")
    if remembering is not None:
        remembering.is_bnb_available.cache_clear()
        remembering.is_bnb_4bit_available.cache_clear()


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Context: what PEFT draws for a new adapter is a function of `seed`, and no generator outside has moved.

    `get_peft_model` starts its parameters by torch's global generators and takes no seed. Seen with PEFT 0.21.
    """
    import torch

    used = [torch.cuda.current_device()] if torch.cuda.is_available() else []  # unsaid, several cards give a warning
    with torch.random.fork_rng(devices=used):
        torch.manual_seed(seed)
        yield


@contextmanager
def no_deprecations() -> Iterator[None]:
    """Context: no FutureWarning.

    `get_peft_model` asks transformers for `is_gradient_checkpointing`, which warns that it is deprecated; users can
    do nothing about it. Seen with PEFT 0.21 on transformers 5.24.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def no_word_of_positions() -> Iterator[None]:
    """Context: prompt tuning may take position ids without a warning.

    `generate` of transformers passes them on; PEFT drops them, warns of it for every new token (peft_model.py,
    `_adjust_prompt_learning_kwargs`) and makes its own, correctly. Seen with PEFT 0.21.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        yield


def loses_scales(model: Any) -> bool:
    """Would a method that reads the weights themselves, as DoRA does, destroy those of this quantised model?

    PEFT reads an 8-bit weight and then moves it back to where it was (utils/integrations.py,
    `dequantize_module_weight`); a move to a CPU makes a new `Int8Params` without its scales. Seen with PEFT 0.21 and
    bitsandbytes 0.50.
    """
    return getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu"
