"""The frozen base model: from a hub id, a folder or a GGUF file. And its losses, at supervised positions only."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, masking_utils

from remix_cli.core.patch import is_linear, set_module
from remix_cli.core.store import BaseIdentity, fingerprint
from remix_cli.cross_entropy import token_losses
from remix_cli.data.batches import Batch
from remix_cli.errors import ArtefactError, RecipeError, is_out_of_memory, shortened
from remix_cli.recipe.schema import Model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_config(model: Model) -> Any:
    """The architecture without weights. Raises RecipeError if there is no such model."""
    return _loading(model, lambda: AutoConfig.from_pretrained(**_where(model)))


def load_tokenizer(model: Model) -> Any:
    """Raises RecipeError if it cannot be found, or has no end token to learn to stop with."""
    tokenizer = _loading(model, lambda: AutoTokenizer.from_pretrained(**_where(model)))
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"model.name_or_path: the tokenizer of {model.name_or_path} has no end-of-sequence token")
    return tokenizer


def load_model(model: Model, device: torch.device) -> Any:
    """The base model on `device`, frozen, in evaluation mode. Raises RecipeError."""
    options: dict[str, Any] = {"dtype": DTYPES[model.dtype], "attn_implementation": model.attn_implementation}
    dequantise = getattr(transformers, "GgufConfig", None)  # transformers before 5.2x always dequantised
    if model.name_or_path.endswith(".gguf") and dequantise is not None:
        options["quantization_config"] = dequantise(dequantize=True)
    if not model.name_or_path.endswith(".gguf"):
        options["use_safetensors"] = True  # the other format is pickle, which can run code
        pickled = sorted(Path(model.name_or_path).glob("pytorch_model*.bin"))
        if pickled and not any(Path(model.name_or_path).glob("*.safetensors")):
            raise ArtefactError(
                f"model.name_or_path: {pickled[0]}: pickled weights are not read, because loading them can run "
                "code; save the model again with safe_serialization=True"
            )
    if model.quantization != "none":
        options |= {"quantization_config": _quantization(model), "device_map": {"": device}}
    with quiet():
        loaded = _loading(model, lambda: AutoModelForCausalLM.from_pretrained(**_where(model), **options))
    if model.quantization == "none":
        if model.name_or_path.endswith(".gguf"):  # dequantised to float32, whatever is asked for
            _cast_parameters(loaded, DTYPES[model.dtype])
        loaded.to(device)
    if model.quantization == "4bit":
        _keep_differentiable(loaded)
    return loaded.requires_grad_(False).eval()


def _cast_parameters(base: nn.Module, dtype: torch.dtype) -> None:
    """Not the buffers: rotary frequencies stay in float32, as in every model that transformers loads."""
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)


def _quantization(model: Model) -> Any:
    """As QLoRA has it (arXiv 2305.14314): NF4, doubly quantised, computing in the model's type. Raises RecipeError."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError("model.quantization: bitsandbytes is not installed; pip install 'remix-cli[quantization]'")
    if model.name_or_path.endswith(".gguf"):
        raise RecipeError(
            "model.quantization: a .gguf file is quantised in its own way; give the model's folder or hub id"
        )
    # on some CPUs it advises, in every process, to install what would fetch native code
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if model.quantization == "8bit":
        # it says in every layer of every pass that it rounds from 16-bit numbers
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[model.dtype],
    )


def _keep_differentiable(base: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU.

    On CPUs with AVX-512 bf16 any pass in evaluation mode packs them, for good, into a layout whose kernel has no
    backward pass: what trains afterwards has wrong gradients and no error (bitsandbytes 0.46 to 0.50).
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def skeleton(model: Model) -> Any:
    """The model's modules without memory for weights: for target names and parameter counts."""
    config = load_config(model)
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.attn_implementation != "flash_attention_2":  # which cannot run here, and need not be installed
        options["attn_implementation"] = model.attn_implementation
    with torch.device("meta"), quiet():
        made = _loading(model, lambda: AutoModelForCausalLM.from_config(config, **options))
    return made.to("meta")  # some code makes weights by constructors that no device context reaches


class _Probe(nn.Module):
    """Stands in a linear layer's place, as an adapted one would, and notes how it is used."""

    def __init__(self, base: nn.Module, name: str, ranks: dict[str, int]):
        super().__init__()
        self.base, self.name, self.ranks = base, name, ranks

    def forward(self, x: Tensor) -> Tensor:
        self.ranks.setdefault(self.name, x.dim())
        return self.base(x)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            self.ranks[self.name] = 0
        return super().__getattr__(name) if name == "base" else getattr(self.base, name)


class _Answers(TorchDispatchMode):
    """A skeleton has no numbers; code that asks for one (is anything infinite?) is told 0, which is no."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0
        return function(*args, **(kwargs or {}))


@contextmanager
def rehearsing(model: Any, training: bool = True) -> Iterator[None]:
    """Context: a skeleton runs as it would in training, or in an evaluation."""
    if hasattr(model, "set_experts_implementation"):  # the others look at numbers
        model.set_experts_implementation("batched_mm")
    model.train(training)
    try:
        with _one_sequence_a_row(), quiet(), _Answers():
            yield
    finally:
        model.eval()


def meta_ids() -> Tensor:
    """Two rows for a skeleton."""
    return torch.zeros(2, 8, dtype=torch.long, device="meta")


@torch.no_grad()
def input_ranks(model: Any) -> dict[str, int]:
    """Of a skeleton: how many dimensions the input of each linear layer has in a training pass over two rows, by name.

    3 where rows, positions and width come apart; 2 where tokens come as one list, as those of shared experts do; 0
    where the layer is not called, or its weight is read past it. Missing is what comes after an operation that needs
    more than one number, which a skeleton has none of.
    """
    found: dict[str, int] = {}
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    for name, module in linears.items():
        set_module(model, name, _Probe(module, name, found))
    try:
        with rehearsing(model):
            model(input_ids=meta_ids(), use_cache=False)
    except Exception:  # of whatever code a model brings: the rest shows in the first pass of training
        return found
    finally:
        for name, module in linears.items():
            set_module(model, name, module)
    return dict.fromkeys(linears, 0) | found


def _where(model: Model) -> dict[str, Any]:
    path = Path(model.name_or_path)
    place: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if path.suffix == ".gguf":
        return place | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return place | {"pretrained_model_name_or_path": model.name_or_path}


def _loading(model: Model, load: Any) -> Any:
    name = model.name_or_path
    local = (
        name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1 or name.startswith("models/")
    )
    if local and not Path(name).exists():
        hint = "; `make model` fetches the demo model" if "SmolLM2-135M-Instruct" in name else ""
        raise RecipeError(f"model.name_or_path: {name}: no such folder or file{hint}")
    try:
        return load()
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        if 'attn_implementation="eager"' in str(error):  # its advice, at the end of a long text
            said = f"{name} has no {model.attn_implementation}; use eager"
            raise RecipeError(f"model.attn_implementation: {said}") from None
        reason = shortened(str(error), 240)
        raise RecipeError(f"model.name_or_path: {name}: cannot be loaded: {reason}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Loading bars and advice of transformers would tear the progress display apart."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers.utils.logging.enable_progress_bar()


def batch_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats at each logit's position, (B, T) float32, 0 where nothing is supervised."""
    losses = token_losses(supervised_logits(model, batch), batch.targets)
    if batch.real is not None:
        losses = losses * batch.real
    flat = losses.new_zeros(batch.input_ids.numel()).index_put((batch.positions,), losses)
    return flat.view(batch.input_ids.shape)


def supervised_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the batch's S supervised positions, (S, V).

    The output layer sees these positions only: its input is gathered on the way in, so that the (B, T, V) logits
    never exist, while the model's own code before and after it stays in charge.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        width = batch.input_ids.shape[1]
        front = args[0].shape[1] - width  # virtual tokens that the method has put in front
        places = batch.positions + (batch.positions // width + 1) * front if front else batch.positions
        return (args[0].flatten(0, 1).index_select(0, places).unsqueeze(0),)

    hook = head.register_forward_pre_hook(gather)
    try:
        with _one_sequence_a_row():
            return model(input_ids=batch.input_ids, use_cache=False).logits[0]
    finally:
        hook.remove()


@contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """Transformers would look at the position ids to see whether rows are packed: a wait for the GPU in every pass.

    And while a step is recorded it would rather make a mask than rely on causal attention alone, which is faster.
    """
    answers = {"find_packed_sequence_indices": lambda _: None, "is_tracing": lambda _=None: False}
    found = {name: getattr(masking_utils, name) for name in answers if hasattr(masking_utils, name)}
    for name in found:
        setattr(masking_utils, name, answers[name])
    try:
        yield
    finally:
        for name, original in found.items():
            setattr(masking_utils, name, original)


# Of a config, what changes the forward pass and neither names nor shapes of weights.
SETTINGS = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "partial_rotary_factor", "rotary_pct"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "layer_norm_rms_epsilon"),
    *("hidden_act", "hidden_activation", "activation_function"),
    *("sliding_window", "use_sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping"),
    *("query_pre_attn_scalar", "attention_multiplier", "embedding_multiplier", "residual_multiplier"),
    *("logits_scaling", "logit_scale", "clip_qkv", "use_parallel_residual", "parallel_attn", "alibi"),
    *("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor"),
)
OFF = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv")  # if None; others: unknown
# What normalisers and pre-tokenizers treat in their own ways: case, accents, digits, blanks, scripts.
PROBE = (
    "Hello, hello WORLD!  it's 12,345.67 or 1 2 3 ?\t\n\n   caf\u00e9 e\u0301 \u00c0 stra\u00dfe \ufb01 \u4e2d\u6587 "
    "\u2014 x_y=(a+1) "
)


def forward_settings(config: Any) -> dict[str, Any]:
    """SETTINGS that the config has, rotary frequencies among them. GGUF files hold numbers of single precision."""
    config = config.get_text_config()
    found = {key: getattr(config, key) for key in SETTINGS if hasattr(config, key)}
    if found.pop("use_sliding_window", True) is False:  # then versions differ in what they make of its size
        found.pop("sliding_window", None)
    found |= _rope("rope", getattr(config, "rope_parameters", None) or {})
    kept = {key: value for key, value in found.items() if value is not None or key in OFF}
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in kept.items()}


def _rope(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Flat; models with several kinds of layers have parameters for each kind."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _rope(f"{name}.{key}", value) if isinstance(value, dict) else {f"{name}.{key}": value}
    return found


def _probe(tokenizer: Any) -> str | None:
    try:
        ids = tokenizer(PROBE)["input_ids"]
    except Exception:  # of whatever code a tokenizer brings, about words that it does not know
        return None
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def identify(model: Model, base: nn.Module, tokenizer: Any) -> BaseIdentity:
    """What an adapter trained on `base` belongs to; the same whether or not an adapter is in place."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.eos_token_id])
    return BaseIdentity(
        base_model=model.name_or_path,
        base_dtype=model.dtype,
        base_fingerprint=fingerprint(base),
        tokenizer_fingerprint=hashlib.sha256(vocabulary.encode()).hexdigest(),
        base_settings=forward_settings(base.config),
        tokenizer_probe=_probe(tokenizer),
    )


@torch.no_grad()
def check_base(model: nn.Module, vocabulary: int) -> None:
    """Refuse a base model that cannot be trained on. Raises RecipeError, or ArtefactError for damaged weights."""
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    if vocabulary > rows:
        raise RecipeError(
            f"model.name_or_path: the tokenizer has {vocabulary} tokens, the model embeds {rows}; "
            "resize the model's embeddings or use its own tokenizer"
        )
    try:
        causal = is_causal(model, vocabulary)
        model.train()  # some code then wants rows of one length, or more than tokens
        model(input_ids=_plain_ids(model, vocabulary), use_cache=False)
    except Exception as error:  # of whatever code a model brings
        if is_out_of_memory(error):
            raise
        said = shortened(f"{type(error).__name__}: {error}", 200)
        raise RecipeError(f"model.name_or_path: the base model's own code fails on a plain batch: {said}") from error
    finally:
        model.eval()
    if not causal:  # nor is one whose logits are not finite
        bad = next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)
        if bad:
            raise ArtefactError(f"model.name_or_path: the base model's {bad} holds non-finite values")
        raise RecipeError("model.name_or_path: later tokens change earlier logits; remix trains causal models only")


@torch.no_grad()
def is_causal(model: nn.Module, vocabulary: int) -> bool:
    """Do earlier logits ignore later tokens? Reward-to-go credit and unmasked right padding rest on it."""
    ids = _plain_ids(model, vocabulary)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % vocabulary
    first, second = (model(input_ids=x, use_cache=False).logits[0, :-1] for x in (ids, changed))
    first, second = first.float(), second.float()
    return bool((first - second).norm() <= 1e-3 * first.norm())  # some kernels round by what else is in the batch


def _plain_ids(model: nn.Module, vocabulary: int) -> Tensor:
    device = next(model.parameters()).device
    return torch.arange(8, device=device).remainder(vocabulary).unsqueeze(0)


def longest_input(model: Any) -> int | None:
    """How many tokens the model was made to read at once; None where its config does not say, or says -1."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if length is not None and length > 0 else None
