"""What an adapter belongs to: names and values of weights, settings of the forward pass, the tokenizer."""

import hashlib
import json
from dataclasses import replace
from typing import Any

from torch import nn

from remix_cli.core.store import BaseIdentity, fingerprint
from remix_cli.recipe.schema import Model

# Of a config, what changes the forward pass and neither names nor shapes of weights.
SETTINGS = (
    # attention
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "partial_rotary_factor",
    "rotary_pct",
    # normalisation
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "layer_norm_rms_epsilon",
    # activation
    "hidden_act",
    "hidden_activation",
    "activation_function",
    # windows and caps
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    # scales
    "query_pre_attn_scalar",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "clip_qkv",
    # the order of a block
    "use_parallel_residual",
    "parallel_attn",
    "alibi",
    # experts
    "num_experts_per_tok",
    "norm_topk_prob",
    "routed_scaling_factor",
)
# None means off; of the others None means that the config does not say.
OFF = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv")
# What normalisers and pre-tokenizers treat in their own ways: case, accents, digits, blanks, scripts.
PROBE = (
    "Hello, hello WORLD!  it's 12,345.67 or 1 2 3 ?\t\n\n   caf\u00e9 e\u0301 \u00c0 stra\u00dfe \ufb01 \u4e2d\u6587 "
    "\u2014 x_y=(a+1) "
)


def identify(model: Model, base: nn.Module, tokenizer: Any) -> BaseIdentity:
    """What an adapter trained on `base` belongs to; the same whether or not an adapter is in place."""
    return replace(identity_of(base, tokenizer), base_model=model.name_or_path, base_dtype=model.dtype)


def identity_of(base: nn.Module, tokenizer: Any = None) -> BaseIdentity:
    """The same of a model in memory, by the name that it was loaded under; it may be without a tokenizer."""
    config: Any = base.config
    dtype = next(base.parameters()).dtype
    return BaseIdentity(
        base_model=config.name_or_path,
        base_dtype=str(dtype).removeprefix("torch."),
        base_fingerprint=fingerprint(base),
        tokenizer_fingerprint="" if tokenizer is None else _vocabulary(tokenizer),
        base_settings=forward_settings(config),
        tokenizer_probe=None if tokenizer is None else _probe(tokenizer),
    )


def _vocabulary(tokenizer: Any) -> str:
    """A hash of all that the tokenizer can say, and of its template."""
    said = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.eos_token_id])
    return hashlib.sha256(said.encode()).hexdigest()


def forward_settings(config: Any) -> dict[str, Any]:
    """SETTINGS that the config has, rotary frequencies among them. GGUF files hold numbers of single precision."""
    config = config.get_text_config()
    by_layer = getattr(config, "per_layer_attributes", None) or ()  # which cannot be read from the config as a whole
    found = {key: getattr(config, key) for key in SETTINGS if key not in by_layer and hasattr(config, key)}
    found |= {key: [getattr(layer, key) for layer in config.per_layer_config] for key in SETTINGS if key in by_layer}
    if found.pop("use_sliding_window", True) is False:  # then versions differ in what they make of its size
        found.pop("sliding_window", None)
    found |= _flat("rope", getattr(config, "rope_parameters", None) or {})
    settings = {}
    for key, value in found.items():
        if value is None and key not in OFF:
            continue
        if isinstance(value, float):
            value = float(f"{value:.6g}")
        settings[key] = value
    return settings


def _flat(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Dotted names; models with several kinds of layers have rotary parameters for each kind."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(f"{name}.{key}", value)
        else:
            found[f"{name}.{key}"] = value
    return found


def _probe(tokenizer: Any) -> str | None:
    """A hash of the token ids of PROBE; None where the tokenizer cannot read it."""
    try:
        ids = tokenizer(PROBE)["input_ids"]
    except Exception:  # of whatever code a tokenizer brings, about words that it does not know
        return None
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
