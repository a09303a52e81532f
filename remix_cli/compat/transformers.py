"""transformers: masks, forward passes, GGUF files, experts, chatter."""

import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def quiet() -> Iterator[None]:
    """Context: no progress bars and no advice, which would tear our own display apart.

    Loading shows a bar for its weights whatever the level of the log (utils/logging.py), for a GGUF file one that
    nothing turns off (modeling_gguf_pytorch_utils.py), and some models log advice as they are made. Seen with
    transformers 5.24.
    """
    import transformers
    from transformers import modeling_gguf_pytorch_utils as gguf

    bar = gguf.tqdm
    gguf.tqdm = lambda tensors, **_: tensors
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        gguf.tqdm = bar
        logger.setLevel(level)
        transformers.utils.logging.enable_progress_bar()


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Context: every row of a batch is one sequence, and a pass that is recorded is a pass like any other.

    masking_utils.py looks at the numbers of the position ids to see whether rows are packed
    (`find_packed_sequence_indices`, since https://github.com/huggingface/transformers/pull/39194): a wait for the GPU
    in every pass, an error while a CUDA graph is recorded, and on tensors without numbers. And where `is_tracing` says
    so, as it does while a graph is recorded, it makes a mask rather than rely on causal attention alone, which is
    faster. Neither has an option, so the two functions are replaced where that module calls them. Seen with
    transformers 5.24.
    """
    from transformers import masking_utils

    answers: dict[str, Callable[..., Any]] = {
        "find_packed_sequence_indices": lambda _: None,
        "is_tracing": lambda _=None: False,
    }
    originals = {name: getattr(masking_utils, name) for name in answers if hasattr(masking_utils, name)}
    for name in originals:
        setattr(masking_utils, name, answers[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(masking_utils, name, original)


def dequantised() -> dict[str, Any]:
    """Options of `from_pretrained` for a GGUF file whose weights are to be ordinary numbers.

    Where `GgufConfig` exists, transformers may keep the file's blocks, and fetches the kernels that compute on them
    (quantizers/quantizer_gguf.py); before, it always dequantised, and took no such option. Seen with
    transformers 5.24.
    """
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def cast_parameters(model: Any, dtype: "torch.dtype") -> None:
    """Cast the weights of a dequantised GGUF file, which come in float32 whatever `dtype` is asked for.

    And not the buffers, as `model.to(dtype)` would: in every model that transformers loads, rotary frequencies stay
    in float32, and in 16 bits they would turn by other angles. Seen with transformers 5.24.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def count_no_experts(model: Any) -> None:
    """The experts of a model run without numbers: on the meta device, too.

    The default way groups tokens by their expert (integrations/moe.py, `grouped_mm`), which depends on numbers and on
    the type; `batched_mm` gathers weights by index. Seen with transformers 5.24.
    """
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")


def advises_eager(error: Exception) -> bool:
    """Was a model refused for the attention that was asked for?

    transformers raises a plain ValueError of many lines (modeling_utils.py, `_sdpa_can_dispatch`), whose last advice
    alone tells it from others. Seen with transformers 5.24.
    """
    return 'attn_implementation="eager"' in str(error)


def runs_as_one_graph(model: Any) -> bool:
    """Is the forward pass of this model free of control flow that depends on numbers, so that it can be recorded?

    A class of transformers says so in `_can_compile_fullgraph` (modeling_utils.py), a private name without a public
    one. Seen with transformers 5.24.
    """
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and bool(model._can_compile_fullgraph)


@contextmanager
def forward_replaced(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Context: `model(...)` calls `forward` instead of the model's own.

    `generate` (generation/utils.py) calls the model itself for every token and takes no function to call instead.
    `forward` needs the signature of the original, which `generate` reads. Seen with transformers 5.24.
    """
    before = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def name_of_cache(model: Any) -> str:
    """What the model's forward pass calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    named = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in named else "past_key_values"


@contextmanager
def imported(file: Path) -> Iterator[Any]:
    """Context: the Python file of an exported model, as a module.

    `AutoModel.from_pretrained(trust_remote_code=True)` would copy it into a cache under the user's home
    (dynamic_module_utils.py) and leave it there. While the module is in use it stands in `sys.modules`, where
    transformers reads the code of a model's class (modeling_utils.py, `_can_set_attn_implementation`): one that it
    does not find there cannot have its attention set. Seen with transformers 5.24.
    """
    name = f"remix_exported_{abs(hash(file.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def recompute_activations(model: Any, settings: dict[str, Any]) -> None:
    """Turn activation checkpointing on, with these arguments of torch.utils.checkpoint.

    The method has a new name since transformers 5.24 (modeling_utils.py), and the old one warns.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


@contextmanager
def taken_for_adapted(model: Any) -> Iterator[None]:
    """Context: a Trainer that is made takes a quantised base with our adapter on it.

    trainer_utils.py (`validate_quantization_for_training`) refuses quantised bases unless it finds PEFT on them, or
    this mark of transformers' own adapters. Seen with transformers 5.24.
    """
    name = "_hf_peft_config_loaded"
    if not getattr(model, "is_quantized", False) or getattr(model, name, False):
        yield
        return
    setattr(model, name, True)
    try:
        yield
    finally:
        setattr(model, name, False)
