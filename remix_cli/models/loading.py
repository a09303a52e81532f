"""Config, tokenizer and weights of the base model, from where the recipe says."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from remix_cli.compat.bitsandbytes import keep_differentiable, no_advice
from remix_cli.compat.tokenizers import splits_its_words
from remix_cli.compat.transformers import advises_eager, cast_parameters, dequantised, quiet
from remix_cli.errors import ArtefactError, RecipeError, shortened
from remix_cli.models.known_shapes import KnownBase
from remix_cli.recipe.schema import Model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_config(model: Model) -> Any:
    """The architecture without weights. Raises RecipeError if there is no such model."""
    if isinstance(model, KnownBase):
        return model.config()
    return loading(model, lambda: AutoConfig.from_pretrained(**_where(model)))


def load_tokenizer(model: Model) -> Any:
    """Raises RecipeError if it cannot be found, or has no end token to learn to stop with."""
    tokenizer = loading(model, lambda: AutoTokenizer.from_pretrained(**_where(model)))
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"model.name_or_path: the tokenizer of {model.name_or_path} has no end-of-sequence token")
    word = splits_its_words(tokenizer)
    if word:
        raise RecipeError(
            f"model.name_or_path: transformers {transformers.__version__} misreads the tokenizer of "
            f'{model.name_or_path}: it splits "{word}", which is one of its tokens; pip install -U transformers'
            + (", or give the model as a folder" if _is_gguf(model) else ", and save the folder anew")
        )
    return tokenizer


def out_of_reach(model: Model) -> bool:
    """Can config or tokenizer be had neither here nor on the hub (off line, or not allowed to)?

    What is wrong in another way is for `load_config` and `load_tokenizer` to say.
    """
    try:
        with quiet():
            AutoConfig.from_pretrained(**_where(model))
            AutoTokenizer.from_pretrained(**_where(model))
    except OSError:  # which all errors of the hub are
        return True
    except (ValueError, ImportError, KeyError):  # it is here, and cannot be read: they say why
        return False
    return False


def load_model(model: Model, device: torch.device) -> Any:
    """The base model on `device`, frozen, in evaluation mode. Raises RecipeError, ArtefactError for pickled weights."""
    dtype = DTYPES[model.dtype]
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": model.attn_implementation}
    if _is_gguf(model):
        options |= dequantised()
    else:
        _refuse_pickle(model)
        options["use_safetensors"] = True  # the other format is pickle, which can run code
    if model.quantization != "none":
        options["quantization_config"] = _quantization(model)
        options["device_map"] = {"": device}
    with quiet():
        loaded = loading(model, lambda: AutoModelForCausalLM.from_pretrained(**_where(model), **options))
    if model.quantization == "none":
        if _is_gguf(model):
            cast_parameters(loaded, dtype)
        loaded.to(device)
    if model.quantization == "4bit":
        keep_differentiable(loaded)
    return loaded.requires_grad_(False).eval()


def _is_gguf(model: Model) -> bool:
    return model.name_or_path.endswith(".gguf")


def _refuse_pickle(model: Model) -> None:
    """Raises ArtefactError for a folder whose weights are pickled only."""
    folder = Path(model.name_or_path)
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ArtefactError(
            f"model.name_or_path: {pickled[0]}: pickled weights are not read, because loading them can run "
            "code; save the model again with safe_serialization=True"
        )


def _quantization(model: Model) -> Any:
    """As QLoRA has it (arXiv 2305.14314): NF4, doubly quantised, computing in the model's type. Raises RecipeError."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError("model.quantization: bitsandbytes is not installed; pip install 'remix-cli[quantization]'")
    if _is_gguf(model):
        raise RecipeError(
            "model.quantization: a .gguf file is quantised in its own way; give the model's folder or hub id"
        )
    no_advice()
    if model.quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[model.dtype],
    )


def _where(model: Model) -> dict[str, Any]:
    """What every `from_pretrained` is told of the place."""
    place: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    path = Path(model.name_or_path)
    if path.suffix == ".gguf":
        place["pretrained_model_name_or_path"] = str(path.parent)
        place["gguf_file"] = path.name
    else:
        place["pretrained_model_name_or_path"] = model.name_or_path
    return place


def loading(model: Model, load: Callable[[], Any]) -> Any:
    """What `load` returns. Raises RecipeError for a folder that is not there, and for whatever a library refuses."""
    name = model.name_or_path
    if model.is_local and not Path(name).exists():
        hint = "; `make model` fetches the demo model" if "SmolLM2-135M-Instruct" in name else ""
        raise RecipeError(f"model.name_or_path: {name}: no such folder or file{hint}")
    try:
        return load()
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        if advises_eager(error):
            said = f"{name} has no {model.attn_implementation}; use eager"
            raise RecipeError(f"model.attn_implementation: {said}") from None
        reason = shortened(str(error), 240)
        raise RecipeError(f"model.name_or_path: {name}: cannot be loaded: {reason}") from None
