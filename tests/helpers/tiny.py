"""Tiny models, tokenizers and recipes that build in well under a second."""

import json
from pathlib import Path

import torch
import yaml
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.patch import Adapter
from remix_cli.train.micro_batch import accumulate_batch

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen": (Qwen2Config, Qwen2ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}

# A chat template like that of `write_tiny_model` that also shows tools and calls
TEMPLATE_WITH_TOOLS = (
    "{% for tool in tools or [] %}<user> {{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot> {{ m.content }}"
    "{% for call in m.tool_calls or [] %} {{ call.function.name }}"
    "{% for name, value in call.function.arguments.items() %} {{ name }} {{ value }}{% endfor %}{% endfor %} <eos>"
    "{% else %}<user> {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random decoder of two layers; head_dim follows the width."""
    config, model = FAMILIES[family]
    torch.manual_seed(seed)
    shape = SHAPE | changes
    extra = {"head_dim": shape["hidden_size"] // shape["num_attention_heads"]} if family == "gemma" else {}
    return model(config(**shape, **extra, attn_implementation="eager")).to(dtype).eval()


def fill_adapter(adapter: Adapter, strength: float = 0.3, seed: int = 1) -> None:
    """Random B and P, so that LoRAs and routers matter as they do after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.parameters().items():
        if not name.endswith("lora_A"):
            scale = 1.0 if name.endswith("router") else strength
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


WORDS = [
    "<pad>",
    "<eos>",
    "<user>",
    "<bot>",
    *[f"w{i}" for i in range(40)],
    *map(str, range(10)),
    "####",
    "?",
    ".",
]
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot> {{ m.content }} <eos>{% else %}"
    "<user> {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A model folder with a word-level tokenizer and a chat template, as the command line reads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = tiny_model(seed=seed)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token=".")
    fast.chat_template = CHAT
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """GSM8K-shaped rows with a regularity that can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for _ in range(count):
            a, b = torch.randint(0, 5, (2,), generator=generator).tolist()
            row = {"question": f"w{a} w{b} w7 ?", "answer": f"w{a + 10} w{b + 10} #### {a + b}"}
            file.write(json.dumps(row) + "\n")
    return path


def recipe_text(model: Path, rows: Path, output: Path, **groups: dict) -> dict:
    """A recipe as a mapping, small enough for a two-second run."""
    recipe = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "adapter": {"pool_size": 4, "active": 2, "rank": 3},
        "router": {"selections": 2},
        "data": {
            "max_length": 32,
            "train": [{"path": str(rows), "format": "gsm8k"}],
            "validation_fraction": 0.2,
        },
        "train": {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 0.02,
            "logging_steps": 1,
            "eval_steps": 2,
            "save_steps": 2,
        },
        "output_dir": str(output),
    }
    for group, values in groups.items():
        recipe[group] = recipe.get(group, {}) | values
    return recipe


def write_recipe(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def backward_step(model, adapter: Adapter, batch, router, *, step: int = 0, beta: float = 0.0, **options) -> None:
    """The gradients of one batch that is the whole step, with the estimator that `router` names."""
    accumulate_batch(
        model,
        adapter,
        batch,
        router,
        make_estimator(router.estimator),
        targets_in_step=len(batch.targets),
        seed=(0, step),
        numbers={"beta": beta},
        backward=lambda loss: loss.backward(),
        **options,
    )
