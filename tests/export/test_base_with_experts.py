"""Exports of a run on a base with experts: what PEFT would lose is refused, and what the refusal offers is true."""

import shutil

import pytest
import torch
from helpers.tiny import fill_adapter, recipe_text, write_recipe
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.core.store import TrainedOn, load_stored, save_adapter
from remix_cli.errors import RecipeError
from remix_cli.export import peft_experts
from remix_cli.export.holds import check_peft_loads
from remix_cli.models.identity import identity_of

DENSE, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_b_proj", "o_proj"]


def model_with_experts():
    """DeepSeek V3 in small: one dense layer, one whose routed experts are one parameter, beside a shared one."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_v3"](**shape)).float().eval()


def stored_on_experts(folder, targets, method="remix"):
    model = model_with_experts()
    of_method = {"pool_size": 1, "active": 1} if method == "rslora" else {"pool_size": 2, "active": 1}
    config = AdapterConfig(rank=2, method=method, target_modules=tuple(targets), **of_method)
    adapter = apply_adapter(model, config, seed=0)
    fill_adapter(adapter)
    folder.mkdir()
    save_adapter(folder, adapter, identity_of(model), TrainedOn())
    return folder


def lost_by_peft(folder) -> list[str]:
    """Names of LoRA tensors in a folder of PEFT that a model loaded with it does not have."""
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(model_with_experts(), str(folder))
    has = {name.replace(".default.", "."): tensor for name, tensor in loaded.named_parameters()}
    wanted = load_file(folder / "adapter_model.safetensors")
    return [name for name, tensor in wanted.items() if name not in has or not torch.equal(has[name], tensor)]


def test_loras_that_peft_loses_are_not_exported_for_it(tmp_path, monkeypatch):
    stored = stored_on_experts(tmp_path / "dense", DENSE)
    with pytest.raises(RecipeError, match=r"LoRAs on down_proj, gate_proj, up_proj .*use --format hf or merged"):
        peft_experts.export_peft_experts(stored, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(peft_experts, "check_peft_loads", lambda *_: None)
    peft_experts.export_peft_experts(stored, tmp_path / "lost")
    assert len(lost_by_peft(tmp_path / "lost" / "lora-0")) == 12, "PEFT keeps them now: the refusal can go"


def test_loras_on_attention_are_exported_and_kept(tmp_path):
    stored = stored_on_experts(tmp_path / "attention", ATTENTION)
    peft_experts.export_peft_experts(stored, tmp_path / "kept")
    assert lost_by_peft(tmp_path / "kept" / "lora-1") == []


@pytest.mark.parametrize(
    ("method", "form", "others"), [("remix", "peft-merged", "hf or merged"), ("rslora", "peft", "merged")]
)
def test_every_format_of_pefts_is_refused(method, form, others, tmp_path):
    stored = load_stored(stored_on_experts(tmp_path / "a", DENSE, method))
    with pytest.raises(RecipeError, match=f"--format {form}: the base model has experts.* use --format {others}$"):
        check_peft_loads(form, stored)
    check_peft_loads("merged", stored)


def test_what_the_refusal_offers_is_true(stage, verb, tmp_path):
    base = tmp_path / "model"
    shutil.copytree(stage[0], base)
    model = model_with_experts()
    model.generation_config.eos_token_id = 1
    model.save_pretrained(base)
    recipe = recipe_text(base, stage[1], tmp_path / "run", train={"max_steps": 2})
    recipe["adapter"]["target_modules"] = ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"]
    verb("train", write_recipe(tmp_path / "r.yaml", recipe))
    for form in ("peft-merged", "peft-experts"):
        _, err = verb("export", tmp_path / "run", "--format", form, "-o", tmp_path / form, expect=2)
        assert "use --format hf or merged" in err
    for form in ("hf", "merged"):
        verb("export", tmp_path / "run", "--format", form, "-o", tmp_path / form)
