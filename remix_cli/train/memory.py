"""What a training step takes on one device, by formula, without running it (docs/scaling.md, Memory on one GPU)."""

from typing import Any

from torch import nn

from remix_cli.core.patch import decoder_layers
from remix_cli.cross_entropy import CHUNK
from remix_cli.diagnostics.parameters import ParameterCounts
from remix_cli.recipe import Recipe
from remix_cli.train.micro_batch import passes_of

GIB = 2**30


def estimate_memory(
    recipe: Recipe, model: nn.Module, counts: ParameterCounts, longest: int, processes: int = 1
) -> dict[str, float]:
    """GiB on one device at the longest batch; an estimate, the frameworks' own overhead is left out.

    `model`: the base or its skeleton, of which shapes alone are read. `longest`: tokens of the longest row.
    """
    config = _text_config(model)
    size = _bytes_of(recipe)
    tokens = _tokens_at_once(recipe, longest)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    kept = _kept_by_a_layer(recipe, model)
    if recipe.train.gradient_checkpointing:
        activations = tokens * (kept + layers * hidden * size)
    else:
        activations = tokens * layers * kept
    logits = tokens * config.vocab_size * 2 * size + 3 * CHUNK * 4
    inputs = layers * tokens * hidden * size  # of the routers, for one selection
    passes = passes_of(recipe.router, recipe.adapter_config().samples, recipe.adapter.train_loras)
    # A pass with gradient keeps them anyway; those of other passes outlive its activations.
    before = passes.with_gradient - 1
    traces = max(before * inputs, passes.total * inputs - activations - logits)
    base = counts.base
    outer = (1 if getattr(config, "tie_word_embeddings", False) else 2) * config.vocab_size * hidden
    if recipe.train.shard_base and processes > 1:  # embeddings and output layer stay gathered, two layers come and go
        share = 0 if recipe.train.shard_base == "offload" else (base - outer) // processes
        base = share + outer + 2 * (base - outer) // layers
    # Embeddings and output layer keep their type; NF4, doubly quantised, takes 4.127 bits a weight.
    packed = {"none": size, "8bit": 1.0, "4bit": 4.127 / 8}[recipe.model.quantization]
    parts = {
        "base weights": outer * size + (base - outer) * packed,
        "adapter, gradient, optimizer": counts.trained * 16,
        "activations of one pass": activations,
        "logits and loss": logits,
        "router inputs of more selections": traces,
    }
    return {name: round(value / GIB, 3) for name, value in parts.items()}


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _bytes_of(recipe: Recipe) -> int:
    """Of a number of the computation's type."""
    return 4 if recipe.model.dtype == "float32" else 2


def _kept_by_a_layer(recipe: Recipe, model: nn.Module) -> float:
    """Bytes for each token that a layer's backward pass needs, with a frozen base and adapters on gate, up and down.

    Frozen linears keep nothing. What keeps something: norms, which work in float32; attention, its queries, keys,
    values and output; the pools, what they read (H once for gate and up, I for down) and three times their n r, twice;
    the activation and its product with up, 3 I.
    """
    config = _text_config(model)
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    adapter = recipe.adapter_config()
    stacked = adapter.on_each * adapter.rank
    queries, keys = _attention_widths(model)
    kept = hidden + 2 * (queries + keys) + 4 * inner + 6 * stacked
    return 4 * _normed(model, queries, keys) + kept * _bytes_of(recipe)


def _attention_widths(model: nn.Module) -> tuple[int, int]:
    """Numbers a token in the queries of the first layer, and in the keys; none without attention.

    Of the layer itself, where it has them by name: in some families the layers' widths differ, and configs do not say.
    """
    config, layers = _text_config(model), decoder_layers(model)
    parts = {name.rpartition(".")[2]: part for name, part in layers[0].named_modules()} if len(layers) else {}
    if {"q_proj", "k_proj"} <= parts.keys():
        queries, keys = (getattr(parts[name], "base_layer", parts[name]) for name in ("q_proj", "k_proj"))
        return int(queries.out_features), int(keys.out_features)
    said = config.to_dict()
    heads = said.get("num_attention_heads")
    if not heads:
        return 0, 0
    width = said.get("head_dim") or config.hidden_size // heads
    return heads * width, (said.get("num_key_value_heads") or heads) * width


def _normed(model: nn.Module, queries: int, keys: int) -> int:
    """Numbers a token that go through the norms of one layer; two norms of the hidden state if the layer is unknown.

    Those of queries and keys, so wide in all, have one weight for all heads (Qwen3, Gemma 3) or one for each (OLMo 2).
    """
    config, layers = _text_config(model), decoder_layers(model)
    if not len(layers):
        return 2 * config.hidden_size
    through = 0
    for name, module in layers[0].named_modules():
        if not type(module).__name__.endswith("Norm"):
            continue
        weight = getattr(module, "weight", None)
        width = config.hidden_size if weight is None else weight.numel()
        through += {"q_norm": queries, "k_norm": keys}.get(name.rpartition(".")[2], width)
    return through


def _tokens_at_once(recipe: Recipe, longest: int) -> int:
    """Of the largest micro-batch, if all rows are as long as the longest."""
    train = recipe.train
    if train.tokens_per_batch is None:
        return train.per_device_train_batch_size * longest
    in_a_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * longest
    return max(longest, min(train.tokens_per_batch, in_a_step))
