"""A base model in 4 or 8 bits under the adapter: trains, resumes, evaluates, and is not exported as what it is not."""

import json

import bitsandbytes
import pytest
import torch
from helpers.common import close
from helpers.tiny import fill_adapter, recipe_text, tiny_model, write_recipe
from transformers import AutoModelForCausalLM

from remix_cli.compat.bitsandbytes import packed_layers
from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.models import load_model
from remix_cli.recipe.schema import Model
from remix_cli.runs import load_run

WIDE = {"hidden_size": 64, "intermediate_size": 128}


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    tiny_model(**WIDE).save_pretrained(path)
    return path


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_pool_is_added_to_the_quantised_layers_output(folder, bits):
    """The adapted layer is the quantised one plus the pool, and only adapters get gradients."""
    model = load_model(Model(name_or_path=str(folder), dtype="float32", quantization=bits), torch.device("cpu"))
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rounded = model(input_ids=ids).logits
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.3, "quantised, and not by much"
    adapter = apply_adapter(model, AdapterConfig(pool_size=4, active=4, rank=2), seed=0)
    assert torch.equal(model(input_ids=ids).logits.detach(), rounded)
    fill_adapter(adapter)
    linear = next(iter(adapter.linears.values()))
    x = torch.randn(1, 5, 64)
    linear.router.block.weighting = linear.router(x)
    with torch.no_grad():
        update = (x @ linear.lora_A.T) @ linear.lora_B.T * adapter.config.scale
        assert close(linear(x) - linear.base_layer(x), update, 1e-4)
    linear.router.block.weighting = None
    model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in adapter.lora_parameters().values())
    with adapter.disabled(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, rounded)


def test_four_bit_weights_to_be_shared_out_are_called_numbers_and_compute_the_same(folder):
    """FSDP2 of torch 2.11 makes every shard a parameter that may learn, which bytes may not."""
    model = load_model(Model(name_or_path=str(folder), dtype="float32", quantization="4bit"), torch.device("cpu"))
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        layers = packed_layers(model)
        assert torch.equal(model(input_ids=ids).logits, wanted)
    for name in layers:
        weight = model.get_submodule(name).weight
        torch.nn.Parameter(weight.detach().as_subclass(torch.Tensor))  # raises for bytes
    assert len(layers) == 14


def dequantised(model, bits):
    """The same network with the rounded weights in ordinary layers."""
    for name, module in list(model.named_modules()):
        if not hasattr(module, "weight") or not hasattr(module.weight, "quant_state" if bits == "4bit" else "SCB"):
            continue
        if bits == "4bit":
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            weight = module.weight.data.float() * (module.weight.SCB.unsqueeze(1) / 127)
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, plain)
    return model


def lora_gradients(model, adapter, ids):
    adapter.model.zero_grad()
    model.train()(input_ids=ids).logits.logsumexp(-1).sum().backward()
    return {name: p.grad.clone() for name, p in adapter.lora_parameters().items()}


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_gradients_are_those_of_the_rounded_weights_before_and_after_an_evaluation(folder, bits, monkeypatch):
    """On every CPU: bitsandbytes is told that this one has AVX-512 bf16, where a pass in evaluation mode used to
    pack the weights for a kernel without a backward pass."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    ids = torch.randint(2, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    options = Model(name_or_path=str(folder), dtype="float32", quantization=bits)
    model, plain = (load_model(options, torch.device("cpu")) for _ in range(2))
    plain = dequantised(plain, bits)
    config = AdapterConfig(method="rslora", pool_size=1, active=1, rank=4)
    adapters = [apply_adapter(m, config, seed=0) for m in (model, plain)]
    for adapter in adapters:
        fill_adapter(adapter)
    expected = lora_gradients(plain, adapters[1], ids)

    def agrees():
        found = lora_gradients(model, adapters[0], ids)
        for name, gradient in expected.items():
            assert cosine(found[name], gradient) > 0.999, name

    agrees()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    agrees()


def test_a_quantised_run_from_start_to_end(stage, tmp_path, verb):
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "run")
    recipe["model"]["quantization"] = "4bit"
    path = write_recipe(tmp_path / "r.yaml", recipe)
    verb("train", path)
    verb("eval", tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    report = json.loads((tmp_path / "run" / "eval" / "adapter.json").read_text())
    assert report["results"][0]["scores"]["loss"] == pytest.approx(held[-1], rel=1e-5)
    assert load_run(tmp_path / "run").stored.identity.base_model == str(model)
    for form in ("hf", "merged"):
        _, err = verb("export", tmp_path / "run", "--format", form, "-o", tmp_path / form, expect=2)
        assert "base model is in 4bit" in err
    in_8_bits = ["model.quantization=8bit", "train.shard_base=true", "output_dir=x"]
    _, err = verb("train", path, *in_8_bits, expect=2)
    assert "cannot be combined with model.quantization: 8bit (4bit can be)" in err


def test_dora_on_an_8_bit_base_is_refused_on_a_cpu(stage, tmp_path, verb):
    pytest.importorskip("peft")
    recipe = recipe_text(*stage[:2], tmp_path / "run") | {"adapter": {"method": "dora", "rank": 2}}
    del recipe["router"]
    recipe["model"]["quantization"] = "8bit"
    _, err = verb("train", write_recipe(tmp_path / "r.yaml", recipe), expect=2)
    assert err.count("error: ") == 1
    assert "dora on an 8-bit base needs a GPU; set model.quantization" in err
    assert not (tmp_path / "run").exists()
