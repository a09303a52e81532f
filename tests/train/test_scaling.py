"""Several processes do what one does, with the base model whole on each or shared out (FSDP2)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.common import ROOT, close
from helpers.runs import PLAIN, launch, recipe_for, run
from helpers.tiny import recipe_text, write_recipe
from safetensors.torch import load_file

from remix_cli.diagnostics.parameters import ParameterCounts
from remix_cli.errors import RecipeError
from remix_cli.models import known_base, skeleton
from remix_cli.recipe import Recipe, load_recipe
from remix_cli.recipe.schema import Model
from remix_cli.train.memory import estimate_memory
from remix_cli.train.shard import as_launched

GRADIENTS = """
import sys
import torch
from torch.distributed.tensor import DTensor
from accelerate import Accelerator
sys.path.insert(0, {tests!r})
from helpers.steps import rows
from helpers.tiny import fill_adapter, tiny_model
from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.data.batches import collate, micro_batches
from remix_cli.core.estimators.registry import make_estimator
from remix_cli.recipe.schema import Router
from remix_cli.train.gradient_sums import GradientSums
from remix_cli.train.shard import shard_base
from remix_cli.train.micro_batch import accumulate_batch, passes_of
import math, numpy as np

accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
everything = rows(5)
lengths = np.array([len(r.input_ids) for r in everything])
targets = sum(int(r.supervised[1:].sum()) for r in everything)

def gradients(router, config, shared, whole, checkpointing=False):
    model = tiny_model(dtype=torch.float64).train()
    adapter = apply_adapter(model, config, seed=0)
    fill_adapter(adapter)
    if checkpointing:
        options = {{"use_reentrant": False, "context_fn": adapter.state.checkpoint_contexts}}
        model.gradient_checkpointing_enable(options)
    if shared:
        shard_base(model, adapter, torch.device("cpu"), world)
        assert isinstance(model.model.layers[0].mlp.up_proj.base_layer.weight, DTensor)
        assert isinstance(model.model.embed_tokens.weight, DTensor)
    place = (0, 1) if whole else (rank, world)
    loras, routers = adapter.lora_parameters(), adapter.router_parameters()
    passes = passes_of(router, adapter.config.samples).with_gradient
    sums = GradientSums(list(loras.values()), list(routers.values()), 1 if whole else world, passes, size=100)
    def backward(loss):
        sums.before_backward()
        loss.backward()
    cuts = micro_batches(np.arange(5), lengths, 2, *place, equally_many=shared)
    sums.begin(len(cuts))
    for first, part, counts in cuts:
        batch = collate([everything[i] for i in part], first)
        accumulate_batch(
            model, adapter, batch, router, make_estimator(router.estimator), seed=(0, 7), numbers={{"beta": 0.5}},
            targets_in_step=targets if counts else math.inf, backward=backward,
        )
    assert len(sums.early) > 3
    assert sums.next == (0 if whole else len(sums.early)), "nothing left while the last pass ran"
    sums.finish()
    return {{name: parameter.grad for name, parameter in adapter.parameters().items()}}

remix = AdapterConfig(pool_size=4, active=2, rank=2)
names = ("paper", "rtg", "control_variate", "straight_through")
cases = [(Router(estimator=name, selections=3), remix, False) for name in names]
cases += [(Router(), AdapterConfig(pool_size=4, active=2, rank=2, method="mixlora"), False)]
cases += [(Router(estimator="control_variate", lora_gradient="one"), remix, True)]
for router, config, checkpointing in cases:
    wanted = gradients(router, config, False, True)
    for shared in (False, True):
        found = gradients(router, config, shared, False, checkpointing)
        for name, gradient in wanted.items():
            error = float((found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
            assert error < 1e-6, (router.estimator, config.method, shared, name, error)
print(f"rank {{rank}}: equal")
accelerator.end_training()
"""


def test_two_processes_have_the_gradients_of_one_whole_or_sharded(tmp_path):
    """In float64, to 1e-6, for every estimator, a soft method, and recomputed activations; three micro-batches over
    two ranks, so that one of them idles."""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS.format(tests=str(ROOT / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0: equal" in done.stdout
    assert "rank 1: equal" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["paper", "rtg", "control_variate", "straight_through"])
def test_a_sharded_run_of_twenty_steps_is_the_run_of_one_process_and_resumes(stage, tmp_path, estimator):
    """Held-out rows that do not divide, odd tails, evaluation, checkpoints; then its second half again."""
    more = {"train": {"max_steps": 20, "save_steps": 10, "eval_steps": 10, "gradient_checkpointing": True}}
    # at a higher rate, differences of rounding grow until a choice of LoRAs falls the other way
    more["router"] = {"estimator": estimator, "learning_rate": 0.01}
    one = recipe_for(stage, tmp_path / "one", **more)
    one = one.model_copy(update={"train": one.train.model_copy(update={"gradient_accumulation_steps": 4})})
    run(one)
    recipe_for(stage, tmp_path / "two", **more)
    sharded = ["train.gradient_accumulation_steps=2", "train.shard_base=true"]
    launch(sharded, tmp_path / "two.yaml", 2)
    a = load_file(tmp_path / "one" / "adapter" / "adapter.safetensors")
    b = load_file(tmp_path / "two" / "adapter" / "adapter.safetensors")
    for name in a:
        assert close(b[name], a[name], 5e-3), name
    held = [
        [json.loads(line).get("eval_loss") for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert [x for x in held[0] if x] == pytest.approx([x for x in held[1] if x], rel=1e-4)
    (tmp_path / "two" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000020")
    launch([*sharded, "--resume"], tmp_path / "two.yaml", 2)
    again = load_file(tmp_path / "two" / "adapter" / "adapter.safetensors")
    assert all(again[name].equal(b[name]) for name in b)


def test_what_cannot_be_sharded_is_refused(stage, tmp_path, verb):
    path = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "run", train={"shard_base": True}))
    _, err = verb("train", path, expect=2)
    assert "one process has nobody to share with" in err
    _, err = verb("train", path, "train.eval_tasks_limit=4", "eval.tasks=[{task: gsm8k}]", expect=2)
    assert "train.shard_base: cannot be combined with train.eval_tasks_limit" in err
    _, err = verb("train", path, "adapter={method: dora}", expect=2)
    assert "train.shard_base: cannot be combined with adapter.method: dora" in err
    assert not (tmp_path / "run").exists()


def test_a_launch_file_for_fsdp2_is_a_shared_base(stage, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "run")))
    assert as_launched(recipe) == recipe
    for offload, wanted in (("false", True), ("true", "offload")):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", offload)
        launched = as_launched(recipe)
        assert launched.train.shard_base == wanted
        assert launched.model_dump(exclude={"train"}) == recipe.model_dump(exclude={"train"})
        assert launched.model.model_fields_set == recipe.model.model_fields_set
        assert "ACCELERATE_USE_FSDP" not in os.environ  # accelerate must not shard what is trained as well


def test_launch_files_that_shard_in_other_ways_are_refused(stage, tmp_path, monkeypatch):
    path = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "run"))
    recipe = load_recipe(path, ["adapter={method: dora}"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RecipeError, match="set fsdp_version: 2 in the launch file"):
        as_launched(recipe)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(RecipeError, match=r"train\.shard_base: cannot be combined with adapter\.method"):
        as_launched(recipe)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match=r"launch with configs/accelerate/fsdp2\.yaml"):
        as_launched(recipe)


FSDP2 = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp2.yaml")]


@pytest.mark.slow
def test_a_run_begun_sharded_on_two_goes_on_whole_on_one_and_the_other_way_round(stage, tmp_path):
    """The steps keep their rows; what differs is rounding."""
    more = {"train": {"max_steps": 20, "save_steps": 10}, "router": {"learning_rate": 0.01}}
    adapter, folder = tmp_path / "a" / "adapter" / "adapter.safetensors", tmp_path / "a"
    recipe_for(stage, folder, **more)
    launch([], tmp_path / "a.yaml", 2, FSDP2)
    assert load_recipe(folder / "recipe.yaml", stored=True).train.shard_base is True
    wanted = load_file(adapter)

    def go_on(arguments, processes, how):
        (folder / "summary.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "step-000020")
        said = launch([*arguments, "--resume"], tmp_path / "a.yaml", processes, how)
        found = load_file(adapter)
        for name, tensor in wanted.items():
            assert close(found[name], tensor, 5e-3), name
        return said

    assert "processes was 2, is 1" in go_on(["train.shard_base=false"], 1, PLAIN[1:])
    assert "processes" not in go_on([], 2, FSDP2)
    assert all(load_file(adapter)[name].equal(tensor) for name, tensor in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["false", "true"])
def test_a_four_bit_base_is_sharded(stage, tmp_path, offload):
    """Begun sharded by two, it ends where one process with the whole 4-bit base ends."""
    pytest.importorskip("bitsandbytes")
    more = {"train": {"max_steps": 6}, "router": {"learning_rate": 0.01}}
    four_bit = ["model.quantization=4bit"]
    recipe_for(stage, tmp_path / "one", **more)
    launch([*four_bit, "train.gradient_accumulation_steps=4"], tmp_path / "one.yaml", 1, PLAIN[1:])
    recipe_for(stage, tmp_path / "two", **more)
    launch_file = yaml.safe_load(Path(FSDP2[1]).read_text())
    launch_file["fsdp_config"]["fsdp_offload_params"] = offload == "true"
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch_file))
    more = [*four_bit, "train.gradient_accumulation_steps=2"]
    launch(more, tmp_path / "two.yaml", 2, ["--config_file", str(tmp_path / "launch.yaml")])
    a, b = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("one", "two"))
    for name in a:
        assert close(b[name], a[name], 5e-3), name


def test_validate_counts_the_processes(stage, tmp_path, verb):
    path = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "run", train={"max_steps": None}))
    alone, four, sharded = (
        json.loads(verb("validate", path, "--json", *more)[0])
        for more in ([], ["--processes", "4"], ["--processes", "4", "train.shard_base=true"])
    )
    assert alone["steps"] > 3 * four["steps"] > 0
    assert sharded["memory_gib"].keys() == alone["memory_gib"].keys()


def test_a_run_by_tokens_ends_where_a_run_by_rows_ends(stage, tmp_path):
    """The same rows in the same steps, cut otherwise, which rounding alone can tell."""
    sizes = {"rows": {}, "tokens": {"tokens_per_batch": 48}}
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for name, size in sizes.items():
        run(recipe_for(stage, tmp_path / name, train={"max_steps": 6} | more | size, adapter={"dropout": 0}))
    rows, tokens = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in sizes)
    assert any(not tokens[name].equal(rows[name]) for name in rows), "cut alike"
    for name in rows:
        assert close(tokens[name], rows[name], 5e-3), name


def test_the_estimate_of_a_sharded_base():
    """Llama 3 8B over 8: an eighth of the layers, the embeddings whole, two layers gathered."""
    model = {"name_or_path": "meta-llama/Llama-3.1-8B", "dtype": "bfloat16"}
    base = known_base(Model.model_validate(model))
    assert base is not None
    counts = ParameterCounts(0, 0, 0, 0, 0, 8_030_261_248)
    recipe = {"model": model, "data": {"train": [{"path": "r.jsonl"}]}, "output_dir": "o"}
    whole = estimate_memory(Recipe.model_validate(recipe), skeleton(base), counts, 512, 8)["base weights"]
    shared = Recipe.model_validate(recipe | {"train": {"shard_base": True}})
    sharded = estimate_memory(shared, skeleton(base), counts, 512, 8)["base weights"]
    assert whole == pytest.approx(14.96, abs=0.01)
    layers = 14.96 - 2 * 128256 * 4096 * 2 / 2**30
    assert sharded == pytest.approx(layers / 8 + 1.957 + 2 * layers / 32, abs=0.01)


def test_a_base_without_attention_is_estimated_too():
    shape = SimpleNamespace(hidden_size=16, num_hidden_layers=2, vocab_size=64)
    base = torch.nn.Module()
    shape.to_dict = lambda: vars(shape)
    base.config = SimpleNamespace(get_text_config=lambda: shape)
    recipe = {"model": {"name_or_path": "m"}, "data": {"train": [{"path": "r.jsonl"}]}, "output_dir": "o"}
    found = estimate_memory(Recipe.model_validate(recipe), base, ParameterCounts(0, 0, 0, 0, 0, 10_000_000), 512)
    assert found["activations of one pass"] > 0
