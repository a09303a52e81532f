"""Exported folders, read back by the libraries that are to read them."""

import json

import pytest
import torch
from conftest import close
from safetensors.torch import load_file
from tiny import recipe_text, tiny_model, write_recipe
from transformers import AutoModelForCausalLM

from remix_cli.adapter.config import AdapterConfig
from remix_cli.adapter.patch import apply_adapter
from remix_cli.adapter.trace import Trace
from remix_cli.data.batches import collate
from remix_cli.export.hf import load_exported
from remix_cli.export.merge import applied, calibrate, merge, merge_pool, price
from remix_cli.runs import load_run

IDS = torch.tensor([[5, 9, 22, 7, 31, 8], [4, 4, 17, 40, 3, 12]])


@pytest.fixture(scope="module")
def trained(stage, tmp_path_factory):
    """Finished runs by level and scope, long enough that the adapter matters."""
    from rich.console import Console

    from remix_cli.recipe import load_recipe
    from remix_cli.train.loop import train

    made = {}

    def run(**router):
        name = "-".join([*router.values(), "run"])
        if name not in made:
            folder = tmp_path_factory.mktemp("trained")
            train_more = {"max_steps": 12, "learning_rate": 0.2, "eval_steps": None, "save_steps": None}
            recipe = recipe_text(*stage[:2], folder / "run", router=router, train=train_more)
            train(load_recipe(write_recipe(folder / "r.yaml", recipe)), Console(quiet=True))
            made[name] = folder / "run"
        return made[name]

    return run


@torch.no_grad()
def ours(folder):
    run = load_run(folder)
    mask = torch.ones_like(IDS)
    with run.adapter.tracing(Trace(prompt=mask.bool(), record=False)):
        routed = run.model(input_ids=IDS).logits
    with run.adapter.disabled():
        base = run.model(input_ids=IDS).logits
    assert not close(routed, base, 9e-3), "the adapter must matter"
    return run, routed


@pytest.mark.parametrize("router", [{}, {"level": "sequence"}, {"scope": "module"}], ids=str)
@pytest.mark.parametrize("reference", [False, True])
def test_the_hf_folder_is_the_routed_model(verb, trained, tmp_path, router, reference):
    run, logits = ours(trained(**router))
    out, _ = verb("export", run.folder.path, "-o", tmp_path / "hf", *(["--reference-base"] if reference else []))
    assert "checked" in out
    model = load_exported(tmp_path / "hf", torch.float32).requires_grad_(False)
    assert close(model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits, logits, 1e-5)
    wide = load_exported(tmp_path / "hf", torch.bfloat16)
    routers = [p for name, p in wide.named_parameters() if "remix_router" in name]
    assert routers
    assert all(p.dtype == torch.float32 for p in routers)  # decisions must not be rounded
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with run.adapter.tracing(Trace(prompt=mask.bool(), record=False)):
        expected = run.model.generate(input_ids=IDS, **options)
    for use_cache in (True, False) if router.get("level") != "sequence" else (True,):
        assert torch.equal(model.generate(input_ids=IDS, use_cache=use_cache, **options), expected)
    again = model.generate(input_ids=IDS.flip(0), **(options | {"attention_mask": mask.flip(0)}))
    assert torch.equal(again, expected.flip(0))  # another prompt chooses anew


def test_stock_transformers_loads_the_hf_folder(verb, trained, tmp_path, monkeypatch):
    run, logits = ours(trained())
    verb("export", run.folder.path, "-o", tmp_path / "hf")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert close(model(input_ids=IDS).logits, logits, 1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "2 of 4 LoRAs" in card
    assert "## Routing" in card


def test_merged_folders_are_the_fitted_model_and_say_what_they_cost(verb, trained, tmp_path):
    peft = pytest.importorskip("peft")
    run, _ = ours(trained())
    out, _ = verb("export", run.folder.path, "--format", "merged", "-o", tmp_path / "merged", "--rank", "12")
    assert "KL(routed, approximation)" in out
    verb("export", run.folder.path, "--format", "peft-merged", "-o", tmp_path / "peft", "--rank", "12")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model.name_or_path, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    with torch.no_grad():
        assert close(wrapped(input_ids=IDS).logits, merged(input_ids=IDS).logits, 1e-4)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 12
    assert "| loss of this approximation |" in (tmp_path / "merged" / "README.md").read_text()


def pool(active, seed=0):
    model = tiny_model(dtype=torch.float64)
    adapter = apply_adapter(model, AdapterConfig(pool_size=4, active=active, rank=3), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in adapter.parameters().items():
            if not name.endswith("lora_A"):
                p.copy_(torch.randn(p.shape, generator=generator) * (3.0 if name.endswith("router") else 0.3))
    return model, adapter


def batches(count=6):
    from remix_cli.data.encode import EncodedRow

    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(2, 60, (20 + i,), generator=generator).numpy() for i in range(count)]
    return [collate([EncodedRow(row, row > 5, "t") for row in rows[i : i + 2]]) for i in range(0, count, 2)]


def test_where_every_lora_is_on_the_merged_lora_is_exact():
    model, adapter = pool(active=4)
    merged = merge_pool(model, adapter, batches(), rank=12)
    cost = price(model, adapter, merged, batches())
    assert cost["KL(routed, approximation) in nats a token"] < 1e-9
    assert cost["loss of this approximation"] == pytest.approx(cost["loss of the routed model"], abs=1e-6)


def test_the_fit_is_the_least_squares_one_and_a_rank_takes_its_best_part():
    """Against the normal equations solved for the whole matrix; a smaller rank is never better."""
    model, adapter = pool(active=2)
    name, linear = next(iter(adapter.linears.items()))
    inputs, updates = [], []

    def watch(_, args, y):
        real = batch.mask.flatten()
        inputs.append(args[0].flatten(0, -2)[real])
        updates.append((y - linear.base_layer(args[0])).flatten(0, -2)[real])

    hook = linear.register_forward_hook(watch)
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch.input_ids)
    hook.remove()
    x, d = torch.cat(inputs), torch.cat(updates)
    best = torch.linalg.lstsq(x, d).solution  # (D_in, D_out)
    moments = calibrate(model, adapter, [name], batches())[name]

    def error(rank):
        part = merge(moments, linear.lora_A, linear.lora_B, adapter.config.scale, rank)
        return float((d - x @ part.down.double().T @ part.up.double().T).norm() / d.norm())

    least = float((d - x @ best).norm() / d.norm())
    errors = [error(rank) for rank in (12, 6, 3, 1)]
    assert errors[0] == pytest.approx(least, rel=1e-2)
    assert errors == sorted(errors)
    assert 0.1 < least < errors[-1]


def test_merging_leaves_the_model_as_it_was():
    model, adapter = pool(active=2)
    before = model(input_ids=IDS).logits
    merged = merge_pool(model, adapter, batches(), rank=3)
    with applied(adapter, merged):
        assert not close(model(input_ids=IDS).logits, before, 9e-3)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_export_refuses_what_it_cannot_do_and_leaves_nothing(verb, trained, stage, tmp_path):
    run = trained()
    _, err = verb("export", run, "-o", stage[2], expect=2)
    assert "exists" in err
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    verb("export", run, "-o", tmp_path / "link", expect=2)
    assert not (tmp_path / "elsewhere").exists()
    _, err = verb("export", run, "--format", "merged", "--rank", "99", "-o", tmp_path / "m", expect=2)
    assert "n r = 12" in err
    verb("export", run, "--format", "onnx", "-o", tmp_path / "o", expect=2)
    assert not list(tmp_path.glob("[mo]*"))


def test_a_folder_that_disagrees_is_not_published(verb, trained, tmp_path, monkeypatch):
    from remix_cli.export import hf

    plain = hf._adapter_tensors
    monkeypatch.setattr(hf, "_adapter_tensors", lambda run: {k: v * 1.5 for k, v in plain(run).items()})
    _, err = verb("export", trained(), "-o", tmp_path / "hf", expect=5)
    assert "does not agree" in err
    assert not (tmp_path / "hf").exists()


def test_experts_and_hf_hold_the_same_numbers(verb, trained, tmp_path):
    verb("export", trained(), "-o", tmp_path / "hf")
    verb("export", trained(), "--format", "peft-experts", "-o", tmp_path / "experts")
    whole = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.1.mlp.up_proj.lora_A"]
    expert = load_file(tmp_path / "experts" / "lora-2" / "adapter_model.safetensors")
    assert torch.equal(whole[6:9], expert["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"])
