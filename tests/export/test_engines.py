"""The exported folder as engines take it that build on transformers' models (vLLM, SGLang): docs/serving.md.

Neither engine can be installed beside the package. `built_by_an_engine` follows their steps: vLLM 0.33.0,
model_executor/models/transformers/base.py; SGLang 0.5.23, srt/models/transformers.py. `with_vllm.py` runs vLLM's own
code, where VLLM_PYTHON names a Python that has it.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.common import close
from helpers.tiny import recipe_text, write_recipe
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from remix_cli.core.trace import Trace
from remix_cli.export.hf import export_hf
from remix_cli.recipe import load_recipe
from remix_cli.runs import load_run
from remix_cli.train.trainer import train

PROMPTS = [torch.tensor([5, 9, 22, 7, 31, 8]), torch.tensor([4, 17, 40]), torch.tensor([12, 3, 9, 9, 21])]
LENGTHS = [len(prompt) for prompt in PROMPTS]
FLAT = torch.cat(PROMPTS)[None]  # (1, all tokens), as engines lay sequences end to end
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@torch.enable_grad()  # also where a test that records no gradients is the first to ask
def finished(model, rows, folder, **groups):
    """A run long enough that the adapter matters."""
    few = {"max_steps": 12, "learning_rate": 0.2, "eval_steps": None, "save_steps": None}
    recipe = recipe_text(model, rows, folder / "run", **({"train": few} | groups))
    train(load_recipe(write_recipe(folder / "r.yaml", recipe)), Console(quiet=True))
    return load_run(folder / "run")


@pytest.fixture(scope="module")
def exported(stage, tmp_path_factory):
    """(folder, run) by the keys of `router`, made once each."""
    made = {}

    def make(**router):
        name = str(router)
        if name not in made:
            folder = tmp_path_factory.mktemp("engine")
            run = finished(*stage[:2], folder, router=router)
            export_hf(run, folder / "hf", reference_base=False)
            made[name] = folder / "hf", run
        return made[name]

    return make


@torch.no_grad()
def logits_of(run):
    """Of the run itself, prompt by prompt, one after the other: (all tokens, vocabulary)."""
    found = []
    for ids in PROMPTS:
        with run.adapter.tracing(Trace(prompt=torch.ones_like(ids[None]).bool(), record=False)):
            found.append(run.model(input_ids=ids[None], use_cache=False).logits[0])
    with run.adapter.disabled():
        plain = torch.cat([run.model(input_ids=ids[None], use_cache=False).logits[0] for ids in PROMPTS])
    assert not close(plain, torch.cat(found), 9e-3), "the adapter must matter"
    return torch.cat(found)


def loaded(folder, auto=AutoModelForCausalLM, dtype=torch.float32):
    return auto.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


SCOPES = [{}, {"scope": "module"}, {"scope": "model"}]


@pytest.mark.parametrize("router", SCOPES, ids=str)
@torch.no_grad()
def test_flattened_and_padded_batches_and_both_auto_classes_give_the_runs_logits(exported, router):
    folder, run = exported(**router)
    expected = logits_of(run)
    model, headless = loaded(folder), loaded(folder, AutoModel)
    assert type(headless).__name__ == "RemixModel"
    flat = model(input_ids=FLAT, position_ids=POSITIONS, use_cache=False).logits[0]
    assert close(flat, expected, 1e-5)
    hidden = headless(input_ids=FLAT, position_ids=POSITIONS, use_cache=False, return_dict=False)[0]
    assert close(model.lm_head(hidden)[0], expected, 1e-5)
    for side in ("left", "right"):
        width = max(LENGTHS)
        pads = [(width - n, 0) if side == "left" else (0, width - n) for n in LENGTHS]
        ids = torch.stack([F.pad(prompt, pad) for prompt, pad in zip(PROMPTS, pads, strict=True)])
        mask = torch.stack([F.pad(torch.ones_like(prompt), pad) for prompt, pad in zip(PROMPTS, pads, strict=True)])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert close(padded[mask.bool()], expected, 1e-5)


@pytest.mark.parametrize("router", SCOPES, ids=str)
def test_generation_with_the_cache_is_remix_generate(exported, router, verb):
    folder, run = exported(**router)
    model = loaded(folder)
    question = "w1 w2 w7 ?"
    ids = torch.tensor([run.encoder.question_ids(question)])
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    out, _ = verb("generate", run.folder.path, question, "--max-new-tokens", "8")
    assert run.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip() == out.strip()
    assert out.strip()


def routers_of(model):
    return {name: p for name, p in model.named_parameters() if "remix_router" in name}


@pytest.mark.parametrize("router", [{}, {"level": "sequence", "clusters": 3}, {"scope": "module"}], ids=str)
def test_routers_keep_float32_however_the_model_comes_to_bfloat16(exported, router):
    folder, _ = exported(**router)
    exact = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "remix_router" in name}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in exact.values()), "rounding must show"
    ways = {
        "loaded": loaded(folder, dtype=torch.bfloat16),
        "moved": loaded(folder).to(torch.bfloat16),
        "and back": loaded(folder).bfloat16().float().half(),
    }
    for way, model in ways.items():
        assert {p.dtype for name, p in model.named_parameters() if "remix_router" not in name} != {torch.float32}, way
        found = routers_of(model)
        assert set(found) == set(exact)
        assert all(p.dtype == torch.float32 and torch.equal(p, exact[name]) for name, p in found.items()), way


class EnginesLinear(nn.Module):
    """What an engine puts in place of an nn.Linear: its own parameter, of the engine's type, filled by its loader."""

    def __init__(self, linear, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.full((linear.out_features, linear.in_features), torch.nan, dtype=dtype))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty(linear.out_features, dtype=dtype))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def attention_by_layer(module, query, key, value, attention_mask, attention_instances=None, **kwargs):
    assert attention_mask is None, "an engine keeps the sequences apart itself"
    return attention_instances[module.layer_idx](query, key, value), None


def causal_by_position(query, key, value):
    """Each token sees those of its own sequence up to itself; (1, heads, tokens, width) in, tokens before heads out."""
    sequence = (POSITIONS[0] == 0).cumsum(0)
    seen = (sequence[:, None] == sequence[None]).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)


def built_by_an_engine(folder, dtype, remakes):
    """The network and its head as an engine makes them; `remakes`: parameters that it did not replace get its own type.

    vLLM does (Base.init_parameters), and widens again what the class asks to keep (Base.keep_in_fp32); SGLang leaves
    each its own type (TransformersBase._init_parameters).
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    ALL_ATTENTION_FUNCTIONS.register("an_engine", attention_by_layer)
    config._attn_implementation = "an_engine"
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype, trust_remote_code=True)
    assert model.is_backend_compatible()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, EnginesLinear(module, dtype))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                own = dtype if remakes else parameter.dtype
                setattr(module, name, nn.Parameter(torch.full(parameter.shape, torch.nan, dtype=own)))
    kept = model._keep_in_fp32_modules_strict
    for name, parameter in model.named_parameters():
        if remakes and any(part in name for part in kept):
            parameter.data = parameter.data.float()
    model.rotary_emb = type(model.rotary_emb)(config=config)  # engines leave its buffers where they are
    wanted = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    head = model.embed_tokens.weight
    if not config.tie_word_embeddings:
        wanted["lm_head.weight"] = head = nn.Parameter(torch.empty_like(head))
    for name, tensor in load_file(folder / "model.safetensors").items():
        wanted.pop(name).data.copy_(tensor)  # a name that the network lacks is an error there, too
    assert not wanted, "a parameter that the files do not fill is an error in vLLM"
    return model, head


def logits_by(model, head):
    """(all tokens, vocabulary) of a network that an engine built, with attention of its own in every layer."""
    engines = dict.fromkeys(range(len(model.layers)), causal_by_position)
    options = {"position_ids": POSITIONS, "use_cache": False, "attention_instances": engines}
    return F.linear(model(input_ids=FLAT, return_dict=False, **options)[0], head)[0]


@pytest.mark.parametrize("remakes", [True, False], ids=["as vLLM", "as SGLang"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", SCOPES, ids=str)
@torch.no_grad()
def test_what_an_engine_builds_gives_the_runs_logits(exported, router, dtype, remakes):
    folder, run = exported(**router)
    model, head = built_by_an_engine(folder, dtype, remakes)
    assert all(p.dtype == torch.float32 for p in routers_of(model).values())
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    logits = logits_by(model, head)
    if dtype == torch.float32:
        assert close(logits, logits_of(run), 1e-5)
    else:  # by transformers itself in that type, which chooses alike
        mine = loaded(folder, dtype=dtype)(input_ids=FLAT, position_ids=POSITIONS, use_cache=False).logits[0]
        assert close(logits, mine, 9e-3)


@pytest.mark.parametrize("router", SCOPES, ids=str)
@torch.no_grad()
def test_the_network_is_one_graph(exported, router):
    """vLLM compiles it whole: nothing in it may need Python to decide."""
    model = loaded(exported(**router)[0], AutoModel)
    expected = model(input_ids=FLAT, position_ids=POSITIONS, use_cache=False).last_hidden_state
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(input_ids=FLAT, position_ids=POSITIONS, use_cache=False).last_hidden_state
    assert close(found, expected, 1e-6)


def test_no_hook_and_no_state_is_left_by_a_pass(exported):
    model = loaded(exported()[0])
    model(input_ids=FLAT, position_ids=POSITIONS, use_cache=False)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert getattr(module, "gates", None) is None


def test_a_model_that_routes_by_sequence_says_what_to_use_instead(exported, verb, tmp_path):
    folder, run = exported(level="sequence")
    with pytest.raises(ValueError, match=r"routes by sequence.*--format peft-merged"):
        AutoModel.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True, dtype=torch.float32
        )
    out, _ = verb("export", run.folder.path, "-o", tmp_path / "hf")
    assert "engines such as vLLM" in out
    assert "--format peft-merged" in out
    assert "such likelihoods are not the trained model's" in (tmp_path / "hf" / "README.md").read_text()
    _, by_token = exported()
    out, _ = verb("export", by_token.folder.path, "-o", tmp_path / "token")
    assert "vLLM" not in out
    assert "likelihoods" not in (tmp_path / "token" / "README.md").read_text()


def test_a_folder_without_base_weights_is_not_built_empty(exported, tmp_path):
    _, run = exported()
    export_hf(run, tmp_path / "hf", reference_base=True)
    config = AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="export it again without --reference-base"):
            auto.from_config(config, trust_remote_code=True, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.model
@torch.no_grad()
def test_a_real_model_through_an_engines_steps(demo_model, stage, tmp_path):
    few = {"max_steps": 3, "learning_rate": 0.02, "eval_steps": None, "save_steps": None}
    run = finished(demo_model, stage[1], tmp_path, train=few, data={"max_length": 128})
    export_hf(run, tmp_path / "hf", reference_base=False)
    expected = logits_of(run)
    model = loaded(tmp_path / "hf")
    assert close(model(input_ids=FLAT, position_ids=POSITIONS, use_cache=False).logits[0], expected, 1e-5)
    built, head = built_by_an_engine(tmp_path / "hf", torch.float32, True)
    assert close(logits_by(built, head), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("router", SCOPES, ids=str)
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="set VLLM_PYTHON to a Python that has vLLM")
def test_vllms_own_code_builds_and_runs_it(exported, router, dtype, tmp_path):
    folder, run = exported(**router)
    torch.save({"ids": FLAT[0], "positions": POSITIONS[0], "logits": logits_of(run)}, tmp_path / "expected.pt")
    command = [os.environ["VLLM_PYTHON"], Path(__file__).with_name("with_vllm.py"), folder, tmp_path, dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    assert set(found["routers"]) == {"torch.float32"}
    expected = logits_of(run)
    if dtype == "float32":
        assert close(found["logits"], expected, 1e-5)
    else:  # as far from float32 as transformers itself in that type, give or take
        with torch.no_grad():
            mine = loaded(folder, dtype=torch.bfloat16)(input_ids=FLAT, position_ids=POSITIONS, use_cache=False)
        assert (found["logits"] - expected).norm() < 1.5 * (mine.logits[0].float() - expected).norm()
