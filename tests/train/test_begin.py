"""What a run begins from: another run, LoRAs of PEFT; and that it is read once."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from helpers.common import close
from helpers.runs import run, small
from helpers.tiny import recipe_text, tiny_model, write_recipe, write_rows, write_tiny_model
from safetensors.torch import load_file, save_file

from remix_cli.core.config import AdapterConfig
from remix_cli.core.lora_folder import load_pool, read_lora
from remix_cli.core.patch import apply_adapter
from remix_cli.core.trace import Trace
from remix_cli.errors import ArtefactError, RecipeError
from remix_cli.models import load_model
from remix_cli.recipe import load_recipe
from remix_cli.runs import load_run
from remix_cli.train import begin, checkpoints, trainer

TARGETS = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    return write_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl", 24), folder


def write_lora(folder, base="model", seed=0, targets=TARGETS, dtype=torch.float32, **config):
    """By PEFT itself, with a B that matters."""
    described = peft.LoraConfig(
        **({"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | config), target_modules=targets
    )
    model = peft.get_peft_model(tiny_model(), described)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for module in model.peft_config.values():
        module.base_model_name_or_path = base
    model.to(dtype).save_pretrained(folder)
    return folder


def ids_of():
    return torch.randint(2, 60, (3, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("omega", ["rslora", "lora"])
@pytest.mark.parametrize("active", [4, 2])
def test_a_pool_adds_what_its_loras_add_in_peft(tmp_path, omega, active):
    """k = n: PEFT's sum over all; k < n: its sum over those that are chosen, at their full scales."""
    folders = [write_lora(tmp_path / str(i), seed=i, lora_alpha=2 + 3 * i, use_rslora=bool(i % 2)) for i in range(4)]
    config = AdapterConfig(pool_size=4, active=active, rank=3, omega=omega, level="sequence")
    adapter = apply_adapter(tiny_model(), config, seed=0)
    tensors, digests = load_pool([read_lora(folder) for folder in folders], config.scale)
    begin.Beginning(tensors, []).apply(adapter)
    assert len(set(digests)) == 4
    ids = ids_of()[:1]
    with torch.no_grad(), adapter.tracing(Trace(prompt=torch.ones_like(ids, dtype=torch.bool))) as trace:
        ours = adapter.model(input_ids=ids).logits
    chosen = {tuple(sorted(decision.chosen.flatten().tolist())) for decision in trace.decisions.values()}
    theirs = peft.PeftModel.from_pretrained(tiny_model(), folders[0], adapter_name="lora0")
    for i in range(1, 4):
        theirs.load_adapter(folders[i], adapter_name=f"lora{i}")
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for layer in layers:  # PEFT activates by layer, as our routers choose by block
        name = next(n for n, m in theirs.base_model.model.named_modules() if m is layer)
        decision = trace.decisions[name.rpartition(".")[0]]
        layer.set_adapter([f"lora{i}" for i in decision.chosen.flatten().tolist()])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    assert close(ours, expected, 1e-6)
    assert all(len(loras) == active for loras in chosen)
    with torch.no_grad():
        assert not close(ours, tiny_model()(input_ids=ids).logits, 1e-3)


def recipe_of(stage, folder, adapter, train=None, **groups):
    """With these settings of the adapter and no others; the run lies in `folder`/out."""
    folder.mkdir(exist_ok=True)
    values = recipe_text(*stage[:2], folder / "out", **groups) | {"adapter": adapter}
    values["train"] |= train or {}
    if adapter.get("train_loras") is False:
        del values["train"]["learning_rate"]
    return load_recipe(write_recipe(folder / "recipe.yaml", values))


def pool(stage, folders, folder, adapter=None, **groups):
    named = {"init_from": [str(f) for f in folders], "pool_size": len(folders), "active": 2, "rank": 3}
    return recipe_of(stage, folder, named | (adapter or {}), **groups)


def test_a_run_of_frozen_loras_trains_the_router_alone(stage, tmp_path):
    folders = [write_lora(tmp_path / str(i), seed=i) for i in range(4)]
    recipe = pool(stage, folders, tmp_path, adapter={"train_loras": False})
    summary = run(recipe)
    begun, _ = load_pool([read_lora(f) for f in folders], recipe.adapter_config().scale)
    ended = load_file(tmp_path / "out" / "adapter" / "adapter.safetensors")
    assert all(torch.equal(ended[name], tensor) for name, tensor in begun.items())
    drawn = apply_adapter(tiny_model(), recipe.adapter_config(), seed=recipe.seed).router_parameters()
    assert all(not torch.equal(ended[name], router) for name, router in drawn.items())
    assert summary["parameters"]["trained"] == summary["parameters"]["router"] > 0
    assert [one["folder"] for one in summary["begun_from"]] == [str(f) for f in folders]


@pytest.mark.parametrize("estimator", ["rtg", "control_variate"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_pool_gives_its_router_the_gradient_that_a_trained_one_gives(estimator, checkpointing):
    from helpers.steps import build, rows

    from remix_cli.core.estimators.registry import make_estimator
    from remix_cli.data.batches import collate
    from remix_cli.recipe.schema import Router
    from remix_cli.train.micro_batch import accumulate_batch

    found = []
    for frozen in (False, True):
        model, adapter = build(checkpointing)
        if frozen:
            adapter.freeze_loras()
        batch = collate(rows())
        router = Router(estimator=estimator)
        passes = []
        accumulate_batch(
            model,
            adapter,
            batch,
            router,
            make_estimator(estimator),
            targets_in_step=len(batch.targets),
            seed=(0, 7),
            numbers={"beta": 0.5},
            backward=lambda loss: (passes.append(1), loss.backward()),  # noqa: B023
        )
        found.append({name: p.grad for name, p in adapter.router_parameters().items()})
        assert all((p.grad is None) == frozen for p in adapter.lora_parameters().values())
        assert len(passes) == (0 if frozen and estimator == "rtg" else 2)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_one_lora_begins_a_plain_run_and_a_plain_run_is_a_lora_of_a_pool(stage, tmp_path):
    folder = write_lora(tmp_path / "peft", lora_alpha=7)
    plain = recipe_of(
        stage,
        tmp_path / "plain",
        {"method": "rslora", "rank": 3, "init_from": str(folder)},
        train={"max_steps": 1, "learning_rate": 1e-9},
    )
    run(plain)
    ours = load_run(tmp_path / "plain" / "out").model
    theirs = peft.PeftModel.from_pretrained(load_model(plain.model, torch.device("cpu")), folder)
    with torch.no_grad():
        assert close(ours(input_ids=ids_of()).logits, theirs(input_ids=ids_of()).logits, 1e-5)
    both = [tmp_path / "plain" / "out", folder]
    summary = run(pool(stage, both, tmp_path / "pool", adapter={"active": 1}, train={"max_steps": 1}))
    assert [one["folder"] for one in summary["begun_from"]] == [str(place) for place in both]
    with pytest.raises(RecipeError, match="names 2 LoRAs, and lora has one"):
        run(recipe_of(stage, tmp_path / "two", {"method": "lora", "rank": 3, "init_from": [str(f) for f in both]}))


@pytest.mark.parametrize("router", [{}, {"level": "sequence", "clusters": 3}], ids=["token", "clusters"])
def test_a_second_stage_begins_where_the_first_ended(stage, tmp_path, router):
    first = small(stage, tmp_path, router=router)
    run(first)
    (tmp_path / "two").mkdir()
    path = str(tmp_path / "out")
    second = small(
        stage, tmp_path / "two", router=router, adapter={"init_from": path}, train={"max_steps": 2, "warmup_ratio": 0.5}
    )
    run(second)
    one, two = ([json.loads(x) for x in (p / "metrics.jsonl").open()] for p in (tmp_path / "out", tmp_path / "two/out"))
    last = [m["eval_loss"] for m in one if "eval_loss" in m][-1]
    assert two[0]["step"] == 0
    assert two[0]["eval_loss"] == last
    stored = load_file(tmp_path / "two" / "out" / "checkpoints" / "step-000002" / "adapter.safetensors")
    begun = load_file(tmp_path / "out" / "adapter" / "adapter.safetensors")
    centres = [name for name in begun if name.endswith("centres")]
    assert bool(centres) == bool(router)
    assert all(torch.equal(stored[name], begun[name]) for name in centres)
    assert not any(torch.equal(stored[name], begun[name]) for name in begun if name.endswith("lora_B"))
    assert (tmp_path / "two" / "out" / "best").is_dir()


def test_a_resumed_run_needs_the_folders_no_more(stage, monkeypatch, tmp_path):
    folders = [write_lora(tmp_path / str(i), seed=i) for i in range(4)]
    recipe = pool(stage, folders, tmp_path)
    run(recipe)
    whole = (tmp_path / "out" / "adapter" / "adapter.safetensors").read_bytes()
    provenance = json.loads((tmp_path / "out" / "summary.json").read_text())["begun_from"]

    def killed(self, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, overwrite=True)
    assert [c.name for c in checkpoints.list_checkpoints(tmp_path / "out" / "checkpoints")] == ["step-000000"]
    for folder in folders:
        shutil.rmtree(folder)
    summary = run(recipe, resume=True)
    assert (tmp_path / "out" / "adapter" / "adapter.safetensors").read_bytes() == whole
    assert summary["begun_from"] == provenance
    with pytest.raises(RecipeError, match=r"adapter.init_from: .*: no such folder"):
        run(recipe, overwrite=True)
    assert (tmp_path / "out" / "adapter" / "adapter.safetensors").read_bytes() == whole


def edited(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 4}, "adapter_config.json: r is 4, and adapter.rank is 3"),
        ({"targets": ["up_proj", "q_proj"]}, r"target_modules are up_proj, q_proj, and adapter.target_modules gate"),
        (
            {"base": "other/llama"},
            "base_model_name_or_path is other/llama, and model.name_or_path is .*write the latter",
        ),
        ({"use_dora": True}, "use_dora is True; only plain LoRAs"),
        ({"rank_pattern": {"up_proj": 5}}, "rank_pattern is .*; only plain LoRAs"),
        ({"bias": "all"}, "bias is 'all'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_told_by_folder_and_key(stage, tmp_path, change, said):
    folders = [write_lora(tmp_path / str(i)) for i in range(3)]
    folders.append(write_lora(tmp_path / "odd", **change))
    with pytest.raises(RecipeError) as caught:
        run(pool(stage, folders, tmp_path))
    (line,) = caught.value.problems
    assert line.startswith(f"adapter.init_from: {tmp_path / 'odd'}")
    with pytest.raises(RecipeError, match=said):
        run(pool(stage, folders, tmp_path))
    assert not (tmp_path / "out").exists()


def test_other_things_that_do_not_fit(stage, tmp_path):
    good = write_lora(tmp_path / "good")
    few = pool(stage, [good] * 3, tmp_path, adapter={"pool_size": 4})
    with pytest.raises(RecipeError, match=r"names 3 LoRAs, but adapter.pool_size is 4"):
        run(few)
    edited(write_lora(tmp_path / "pissa"), init_lora_weights="pissa_niter_4")
    with pytest.raises(RecipeError, match="changes the base model too"):
        run(pool(stage, [good, tmp_path / "pissa"], tmp_path))
    broken = write_lora(tmp_path / "nan")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(ArtefactError, match="holds non-finite values"):
        run(pool(stage, [good, broken], tmp_path))
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(RecipeError, match="pickled weights"):
        run(pool(stage, [good, broken], tmp_path))
    (broken / "adapter_config.json").write_text("[" * 9000)
    with pytest.raises(RecipeError, match=r"adapter_config.json: cannot be read"):
        run(pool(stage, [good, broken], tmp_path))
    edited(write_lora(tmp_path / "ia3"), peft_type="IA3")
    with pytest.raises(RecipeError, match="peft_type is 'IA3'"):
        run(pool(stage, [good, tmp_path / "ia3"], tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="neither a run, nor an adapter of one, nor a PEFT folder"):
        run(pool(stage, [good, tmp_path / "empty"], tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"adapter": {"rank": 2}}, "adapter.rank was 3 there, and is 2 here; set it to 3"),
        ({"adapter": {"active": 3}}, "adapter.active was 2 there, and is 3 here"),
        ({"router": {"unit_input": False}}, "router.unit_input was True there"),
        ({"adapter": {"method": "lora"}}, "method is remix, and one LoRA is needed here"),
        ({"adapter": {"method": "mixlora"}}, "is of method remix, and adapter.method is mixlora"),
        ({"adapter": {"target_modules": ["up_proj"]}}, r"adapter.target_modules to \[gate_proj, up_proj, down_proj\]"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_an_adapter_of_another_shape_is_refused(stage, tmp_path, groups, said):
    first = stage[2] / "out"
    if not first.exists():
        run(small(stage, stage[2], train={"max_steps": 1}))
    adapter = {"init_from": str(first), "pool_size": 4, "active": 2, "rank": 3}
    adapter |= groups.get("adapter", {})
    if adapter.get("method") == "lora":
        del adapter["pool_size"], adapter["active"]
    with pytest.raises(RecipeError, match=said):
        run(recipe_of(stage, tmp_path, adapter, router=groups.get("router", {})))


def test_another_base_model_and_the_output_itself_are_refused(stage, tmp_path):
    run(small(stage, tmp_path))
    with pytest.raises(RecipeError, match="lies in output_dir, which the run replaces"):
        run(small(stage, tmp_path, adapter={"init_from": str(tmp_path / "out")}), overwrite=True)
    other = (write_tiny_model(tmp_path / "model", seed=5), *stage[1:])
    (tmp_path / "b").mkdir()
    with pytest.raises(ArtefactError, match="trained on another base model than"):
        run(small(other, tmp_path / "b", adapter={"init_from": str(tmp_path / "out")}))
    assert not (Path(tmp_path) / "b" / "out").exists()
