"""Whatever passes the checks before training also takes a step, whatever the architecture."""

import numpy as np
import pytest
import torch
from helpers.tiny import backward_step, recipe_text, tiny_model, write_rows
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from remix_cli import models
from remix_cli.compat.transformers import cast_parameters
from remix_cli.data.batches import collate
from remix_cli.data.rows import EncodedRow
from remix_cli.errors import RecipeError
from remix_cli.methods.apply import apply_method
from remix_cli.models import load_model
from remix_cli.recipe import Recipe
from remix_cli.recipe.schema import Adapter, Model
from remix_cli.train.prepare import check_recipe

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
GATES, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]
NO_SDPA = ("gpt_oss", "mamba")
ABSENT, LISTED, UNCALLED = "no linear layer matches", "as one list", "is not called as a layer"
CASES = [
    ("llama", GATES, None),
    ("gemma3_text", GATES, None),
    ("qwen3_5_text", GATES, None),
    ("glm4_moe", GATES, None),
    ("jamba", GATES, None),
    ("recurrent_gemma", GATES, None),
    ("qwen2_moe", GATES, LISTED),
    ("qwen2_moe", ATTENTION, None),
    ("qwen3_next", GATES, LISTED),
    ("qwen3_next", ["in_proj_qkvz", "out_proj"], None),
    ("qwen3_5_moe_text", GATES, LISTED),
    ("ernie4_5_moe", GATES, LISTED),
    ("llama4_text", GATES, LISTED),
    ("llama4_text", ATTENTION, None),
    ("mixtral", GATES, None),  # the default, which stands for the attention's there
    ("mixtral", ["up_proj", "down_proj"], ABSENT),
    ("gpt_oss", GATES, None),
    ("gpt_oss", ["q_proj", "v_proj", "down_proj"], ABSENT),
    ("phimoe", ATTENTION, None),
    ("olmoe", ATTENTION, None),
    ("mamba", GATES, ABSENT),
    ("mamba", ["in_proj"], None),
    ("mamba", ["in_proj", "out_proj"], UNCALLED),
    ("gpt2", GATES, ABSENT),
    ("bart", ["q_proj"], UNCALLED),  # attends to an encoder as well, which a causal run has not
    ("bart", ["self_attn.q_proj", "fc1"], None),
    ("gemma3n_text", GATES, None),
]


def recipe(folder, family, targets, scope="block") -> Recipe:
    config = CONFIG_MAPPING[family](**(MAMBA if family == "mamba" else SHAPE))
    config.save_pretrained(folder)
    rows = write_rows(folder / "rows.jsonl", 4)
    text = recipe_text(folder, rows, folder / "out", router={"scope": scope}, adapter={"target_modules": targets})
    if family in NO_SDPA:
        text["model"]["attn_implementation"] = "eager"
    return Recipe.model_validate(text)


def eager(wanted: Recipe) -> Recipe:
    return wanted.model_copy(update={"model": wanted.model.model_copy(update={"attn_implementation": "eager"})})


def adapting(wanted: Recipe, **changes) -> Recipe:
    return wanted.model_copy(update={"adapter": wanted.adapter.model_copy(update=changes)})


def step(wanted: Recipe) -> None:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(wanted.model.name_or_path)
    model = AutoModelForCausalLM.from_config(config).float().requires_grad_(False).train()
    adapter = apply_method(model, wanted.adapter_config(), seed=0)
    batch = collate([EncodedRow(row, row > 6, "t") for row in (np.arange(3, 15), np.arange(5, 13))])
    backward_step(model, adapter, batch, wanted.router, dropout_seed=0)
    assert all(p.grad is not None for p in adapter.lora_parameters().values())


@pytest.mark.parametrize("scope", ["block", "module"])
@pytest.mark.parametrize(("family", "targets", "refused"), CASES)
def test_what_the_checks_pass_takes_a_step(family, targets, refused, scope, tmp_path):
    wanted = recipe(tmp_path, family, targets, scope)
    if refused is None:
        check_recipe(wanted)
        step(wanted)
        return
    with pytest.raises(RecipeError, match=refused) as error:
        check_recipe(wanted)
    assert len(error.value.problems) == 1
    if refused == LISTED:  # a skeleton of unusual code may not tell; then the first pass does
        with pytest.raises(RecipeError, match=refused):
            step(wanted)
    if refused != ABSENT:  # what the message offers is true
        could = str(error.value).partition("remix can adapt: ")[2].split(", ")
        check_recipe(adapting(wanted, target_modules=could))
        step(adapting(wanted, target_modules=could))


def test_a_method_without_a_router_adapts_shared_experts(tmp_path):
    wanted = adapting(recipe(tmp_path, "qwen2_moe", GATES), method="rslora")
    check_recipe(wanted)
    step(wanted)
    with pytest.raises(RecipeError, match=UNCALLED):
        check_recipe(adapting(recipe(tmp_path, "mamba", ["out_proj"]), method="rslora"))


@pytest.mark.parametrize(
    ("family", "target", "refused"),
    [
        ("gemma3n_text", "modality_router", "is not called as a whole"),
        ("gemma3n_text", "per_layer_model_projection", "is not called with hidden states"),
        ("gemma3n_text", "per_layer_input_gate", "no router can follow a row"),
        ("ctrl", "0", "is a row of layers"),
    ],
)
def test_a_block_at_whose_input_no_router_can_stand(family, target, refused, tmp_path):
    by_block = recipe(tmp_path, family, [target])
    with pytest.raises(RecipeError, match=refused):
        check_recipe(by_block)
    by_module = by_block.model_copy(update={"router": by_block.router.model_copy(update={"scope": "module"})})
    if target == "modality_router":
        with pytest.raises(RecipeError, match="ran twice"):
            check_recipe(by_module)
    else:
        check_recipe(by_module)
        step(by_module)


@pytest.mark.parametrize("method", ["dora", "ia3", "vblora"])
def test_what_peft_puts_on_an_uncalled_layer_is_refused_as_ours_is(method, tmp_path):
    pytest.importorskip("peft")
    wanted = recipe(tmp_path, "bart", ["q_proj"])
    with pytest.raises(RecipeError, match=UNCALLED):
        check_recipe(adapting(wanted, method=method, vector_length=4))
    check_recipe(adapting(wanted, method=method, vector_length=4, target_modules=["self_attn.q_proj"]))


def test_a_prefix_that_a_model_does_not_read_is_refused(tmp_path):
    pytest.importorskip("peft")
    wanted = eager(recipe(tmp_path, "bart", ["fc1"]))
    CONFIG_MAPPING["openai-gpt"](n_embd=32, n_layer=2, n_head=2, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="prefix changes nothing in this model"):
        check_recipe(wanted.model_copy(update={"adapter": Adapter(method="prefix", virtual_tokens=4)}))


def test_a_weight_that_only_an_evaluation_reads(tmp_path):
    shape = {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 24}
    wanted = eager(recipe(tmp_path, "llama", ["output"]))
    CONFIG_MAPPING["rwkv"](**shape, num_hidden_layers=2, context_length=64).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"remix cannot adapt these in this model.*weight"):
        check_recipe(wanted)
    check_recipe(adapting(wanted, target_modules=["receptance"]))


def test_ia3_needs_to_know_the_feed_forward_layers(tmp_path):
    pytest.importorskip("peft")
    wanted = adapting(recipe(tmp_path, "bart", ["fc1"]), method="ia3")
    own = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
    CONFIG_MAPPING["bart"](**own).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no intermediate_size"):
        check_recipe(wanted)


def test_multi_head_latent_attention_takes_a_lora(tmp_path):
    """Its keys and values are made of a tensor with four dimensions."""
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    wanted = adapting(recipe(tmp_path, "deepseek_v3", ["kv_b_proj"]), method="rslora")
    shape = SHAPE | latent | {"num_key_value_heads": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
    del shape["head_dim"]
    CONFIG_MAPPING["deepseek_v3"](**shape).save_pretrained(tmp_path)
    check_recipe(wanted)
    step(wanted)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_base_in_bfloat16_computes_as_transformers_has_it(family, tmp_path):
    """Its rotary frequencies stay in float32: rounded, they turn far positions by the wrong angle."""
    tiny_model(family).save_pretrained(tmp_path)
    ids = torch.randint(2, 60, (1, 48), generator=torch.Generator().manual_seed(1))
    ours = load_model(Model(name_or_path=str(tmp_path), dtype="bfloat16"), torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in ours.parameters())
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    widened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    cast_parameters(widened, torch.bfloat16)  # as a dequantised GGUF file
    assert torch.equal(widened(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_a_base_whose_own_code_fails_is_refused_in_one_line():
    model = tiny_model()
    forward = model.model.forward
    model.model.forward = lambda *a, **k: 1 // 0 if model.training else forward(*a, **k)
    with pytest.raises(RecipeError, match="own code fails on a plain batch: ZeroDivisionError"):
        models.check_base(model, 64)
    assert not model.training
    model.model.layers[0].forward = lambda *_, **__: 1 // 0
    with pytest.raises(RecipeError, match="own code fails on a plain batch: ZeroDivisionError"):
        models.check_base(model, 64)


def test_a_base_without_the_attention_asked_for_is_refused_without_its_weights(tmp_path):
    wanted = recipe(tmp_path, "gpt_oss", ATTENTION)
    asked = wanted.model.model_copy(update={"attn_implementation": "sdpa"})
    with pytest.raises(RecipeError, match=r"model.attn_implementation: \S+ has no sdpa; use eager"):
        check_recipe(wanted.model_copy(update={"model": asked}))


def test_a_base_that_says_no_length_has_none(tmp_path):
    """XLNet's config says -1; and its weights come from constructors that make real ones on a skeleton."""
    pytest.importorskip("peft")
    wanted = eager(recipe(tmp_path, "llama", ["layer_1"]))
    shape = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 24}
    CONFIG_MAPPING["xlnet"](**shape).save_pretrained(tmp_path)
    check_recipe(adapting(wanted, method="rslora"))
    check_recipe(wanted.model_copy(update={"adapter": Adapter(method="p_tuning", virtual_tokens=4)}))


def test_a_prefix_of_the_wrong_shape_for_a_model_of_which_no_skeleton_runs(tmp_path):
    pytest.importorskip("peft")
    wanted = recipe(tmp_path, "llama", GATES)
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"ffn_hidden_size": 24, "expert_ffn_hidden_size": 12, "zero_expert_num": 2, "moe_topk": 2}
    shape = SHAPE | latent | experts | {"head_dim": 4, "num_key_value_heads": 2, "num_layers": 2}
    del shape["num_hidden_layers"]
    CONFIG_MAPPING["longcat_flash"](**shape).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"adapter.method: prefix does not suit this model: RuntimeError"):
        check_recipe(wanted.model_copy(update={"adapter": Adapter(method="prefix", virtual_tokens=4)}))
    check_recipe(wanted.model_copy(update={"adapter": Adapter(method="prompt", virtual_tokens=4)}))
