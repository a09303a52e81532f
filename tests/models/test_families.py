"""Families of models, each from a random tiny model of its real class: the whole way that a user goes.

Nothing is named that a recipe may leave out: which layers are adapted, and where routers stand, is found in the model.
"""

import json
import re
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers.common import ROOT, close
from helpers.runs import run
from helpers.tiny import recipe_text, write_recipe, write_rows, write_tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from remix_cli.core.patch import DEFAULT_TARGETS, TargetError, find_targets, meant_by
from remix_cli.core.trace import Trace, Weighting
from remix_cli.errors import Interrupted
from remix_cli.recipe import load_recipe
from remix_cli.runs import load_run
from remix_cli.train import trainer
from remix_cli.train.prepare import check_recipe

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # so that what a block adds is not lost beside its input
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GATES = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ONE_LIST = "as one list"
TRAIN = {"max_steps": 3, "save_steps": 2, "eval_steps": 3, "learning_rate": 0.05}
TOLERANCE = 1e-5  # of the logits, relative, in norm: float32, another order of sums


@dataclass(frozen=True)
class Family:
    """What is special in one: `type` of config, changes of SHAPE (None leaves a key out), what the default picks."""

    name: str  # as docs/methods.md has it
    type: str
    targets: tuple[str, ...] = GATES  # that a recipe without target_modules adapts, or that the refusal offers
    blocks: tuple[str, ...] = ("mlp", "mlp")  # where the routers of the two layers stand
    shape: dict[str, Any] = field(default_factory=dict)
    refused: bool = False  # are the default targets? The line names what a recipe can set instead
    eager: bool = False  # does a recipe have to ask for eager attention? The line that refuses another says so
    peft: bool = True  # does PEFT put the LoRAs of a peft-experts folder on the layers that it names?
    quick: bool = False  # the way of each kind is gone in the usual tests, of all in `make slow`


FAMILIES = [
    Family("Llama", "llama", quick=True),
    Family("Mistral", "mistral"),
    Family("Qwen2", "qwen2"),
    Family("Qwen3", "qwen3"),
    Family("Qwen3.5", "qwen3_5_text", shape={"layer_types": ["linear_attention", "full_attention"]}),
    Family("Gemma 2", "gemma2", eager=True),
    Family("Gemma 3", "gemma3_text"),
    Family(
        "Gemma 4", "gemma4_text", shape={"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}, quick=True
    ),
    Family("OLMo 2", "olmo2"),
    Family("SmolLM3", "smollm3"),
    Family("Granite", "granite"),
    Family("Phi-3", "phi3", FUSED),
    Family(
        "Phi-4-mini",
        "phi3",
        FUSED,
        shape={"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        quick=True,
    ),
    Family("GLM-4 (glm)", "glm", FUSED),
    Family("GLM-4 (glm4)", "glm4", FUSED),
    Family(
        "DeepSeek-V3",
        "deepseek_v3",
        blocks=("mlp", "mlp.shared_experts"),
        shape=EXPERTS
        | LATENT
        | {"head_dim": None, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1},
        quick=True,
        peft=False,  # as in checkpoints of old, it takes gate_proj of whatever module for the routed experts'
    ),
    Family("Mixtral", "mixtral", ATTENTION, ("self_attn",) * 2, EXPERTS | {"num_local_experts": 4}),
    Family("Qwen3-MoE", "qwen3_moe", ATTENTION, ("self_attn",) * 2, EXPERTS | {"num_experts": 4}),
    Family(
        "GPT-OSS", "gpt_oss", ATTENTION, ("self_attn",) * 2, EXPERTS | {"num_local_experts": 4}, eager=True, quick=True
    ),
    Family(
        "Qwen2-MoE",
        "qwen2_moe",
        ATTENTION,
        ("self_attn",) * 2,
        EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 12},
        refused=True,
    ),
]


def config_of(family: Family):
    shape = {key: value for key, value in (SHAPE | family.shape).items() if value is not None}
    return CONFIG_MAPPING[family.type](**shape)


def write_base(folder, family: Family) -> None:
    """The family's folder: the tokenizer of every tiny model, and random weights of the family's class."""
    write_tiny_model(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(family)).float().save_pretrained(folder)


def routers_of(family: Family) -> list[str]:
    return [f"model.layers.{i}.{block}" for i, block in enumerate(family.blocks)]


def recipe_of(tmp_path, output: str, **groups):
    """A recipe that leaves everything about the model to the model, but for `groups`."""
    text = recipe_text(
        tmp_path / "base",
        tmp_path / "rows.jsonl",
        tmp_path / output,
        train=TRAIN,
        eval={"tasks": [{"task": "nll"}]},
    )
    for group, values in groups.items():
        text[group] |= values
    return write_recipe(tmp_path / f"{output}.yaml", text)


def needed(family: Family, verb, tmp_path) -> dict[str, dict[str, Any]]:
    """What a recipe has to name, as the lines say by which `validate` refuses one without."""
    groups: dict[str, dict[str, Any]] = {}
    if family.eager:
        err = verb("validate", recipe_of(tmp_path, "whole"), expect=2)[1]
        assert re.fullmatch(r"error: model.attn_implementation: \S+ has no sdpa; use eager\n", err)
        groups["model"] = {"attn_implementation": "eager"}
    if family.refused:
        err = verb("validate", recipe_of(tmp_path, "whole", **groups), expect=2)[1]
        refused, _, could = err.partition("remix can adapt: ")
        assert refused.count("\n") == 0
        assert ONE_LIST in refused
        assert set(family.targets) <= set(could.strip().split(", "))
        groups["adapter"] = {"target_modules": list(family.targets)}
    return groups


def stopped_and_resumed(recipe, monkeypatch, step: int) -> None:
    """A run that gets SIGTERM during `step`, and goes on from its last checkpoint."""
    original = trainer.Trainer._step

    def stopping(self, index):
        if index + 1 == step:
            self.signals.received = signal.SIGTERM
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", stopping)
        with pytest.raises(Interrupted):
            run(recipe)
    run(recipe, resume=True)


@torch.no_grad()
def logits_of(loaded, ids):
    with loaded.adapter.tracing(Trace(prompt=torch.ones_like(ids, dtype=torch.bool), record=False)):
        return loaded.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_checks_find_where_adapters_and_routers_go(family, verb, tmp_path):
    config_of(family).save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 16)
    groups = needed(family, verb, tmp_path)
    adapter = check_recipe(load_recipe(recipe_of(tmp_path, "whole", **groups)))
    assert adapter.config.target_modules == family.targets
    assert {name.rpartition(".")[2] for name in adapter.linears} == set(family.targets)
    assert list(adapter.routers) == routers_of(family)


def test_the_page_of_methods_says_the_same_of_every_family():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition("## Which layers")[2]
    lines = [line.strip("| ").split(" | ") for line in page.partition("\n## ")[0].splitlines() if line[:2] == "| "]
    rows = {name: (default, more) for names, default, more in lines[1:] for name in names.split(", ")}
    assert rows.keys() == {family.name for family in FAMILIES}
    for family in FAMILIES:
        default, more = rows[family.name]
        assert tuple(re.findall(r"`(\w+)`", more if family.refused else default)) == family.targets
        assert ("refused" in default) == family.refused
        assert ("`model.attn_implementation: eager`" in more) == family.eager
        assert ("PEFT" in more) != family.peft


CASES = [pytest.param(f, id=f.name, marks=() if f.quick else pytest.mark.slow) for f in FAMILIES]


@pytest.mark.parametrize("family", CASES)
def test_a_user_goes_the_whole_way(family, verb, tmp_path, monkeypatch):
    write_base(tmp_path / "base", family)
    write_rows(tmp_path / "rows.jsonl", 16)
    groups = needed(family, verb, tmp_path)
    path, whole = recipe_of(tmp_path, "whole", **groups), tmp_path / "whole"
    said = verb("validate", path)[0]
    assert "trained" in said
    stand_in = f"targets   {', '.join(family.targets)}: what the default means here"
    assert (stand_in in said) == (family.targets != DEFAULT_TARGETS and "adapter" not in groups)

    run(load_recipe(path))
    stopped_and_resumed(load_recipe(recipe_of(tmp_path, "broken", **groups)), monkeypatch, step=2)
    for file in ("adapter/adapter.safetensors", "checkpoints/step-000003/optimizer.safetensors"):
        assert (whole / file).read_bytes() == (tmp_path / "broken" / file).read_bytes()

    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    assert losses[-1] < losses[0]
    (nll,) = json.loads(verb("eval", whole, "--json")[0])["results"]
    assert nll["scores"]["loss"] == pytest.approx(losses[-1], rel=1e-5)

    routing = json.loads(verb("route-stats", whole, "--json", "--limit", "3")[0])
    assert [block["name"] for block in routing["blocks"]] == routers_of(family)
    loaded = load_run(whole)
    assert loaded.stored.config.target_modules == family.targets
    assert {name.rpartition(".")[2] for name in loaded.adapter.linears} == set(family.targets)

    ids = torch.randint(4, 50, (2, 9))
    ours = logits_of(loaded, ids)
    with loaded.adapter.disabled(), torch.no_grad():
        assert not close(loaded.model(input_ids=ids).logits, ours, 9e-3), "the adapter must matter"
    verb("export", whole, "--output", tmp_path / "hf")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert close(theirs(input_ids=ids).logits, ours, TOLERANCE)

    if not family.peft:
        return
    peft = pytest.importorskip("peft")
    verb("export", whole, "--format", "peft-experts", "--output", tmp_path / "experts")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    alone = peft.PeftModel.from_pretrained(base, tmp_path / "experts" / "lora-1").eval()
    c = loaded.stored.config
    second = torch.zeros(c.pool_size * c.rank)
    second[c.rank : 2 * c.rank] = c.scale
    for router in loaded.adapter.routers.values():
        router.forward = lambda x: Weighting(second.expand(*x.shape[:-1], -1), None)
    with torch.no_grad():
        assert close(alone(input_ids=ids).logits, logits_of(loaded, ids), TOLERANCE)


@pytest.mark.parametrize(
    ("type_", "ends"),
    [
        ("phi", ("mlp.fc1", "mlp.fc2")),
        ("opt", ("fc1", "fc2")),
        ("gpt_neox", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
        ("falcon", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
        ("nemotron", ("mlp.up_proj", "mlp.down_proj")),
        ("starcoder2", ("mlp.c_fc", "mlp.c_proj")),
    ],
)
def test_the_default_finds_feed_forward_layers_of_other_names(type_, ends):
    own = {"opt": {"ffn_dim": 24, "word_embed_proj_dim": 32}, "falcon": {"num_kv_heads": 1}}.get(type_, {})
    shape = {key: value for key, value in (SHAPE | own).items() if key != "head_dim"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[type_](**shape))
    found = find_targets(model, DEFAULT_TARGETS)
    assert len(found) == 2 * len(ends)
    assert all(name.endswith(ends) for name in found)
    assert found == find_targets(model, meant_by(model, DEFAULT_TARGETS))
    with pytest.raises(TargetError, match="no linear layer matches 'gate_proj'"):  # names given are not replaced
        find_targets(model, ("gate_proj",))
