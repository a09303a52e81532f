"""RemixTrainer against `remix train` and a plain loop; its own checkpoints; what it refuses."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.common import ROOT
from helpers.features import (
    CONFIG,
    ROUTER,
    FirstGradients,
    InOrder,
    Stops,
    collate_features,
    feature_rows,
    gradients_of_trainer,
    trainer_of,
)
from helpers.tiny import fill_adapter, recipe_text, tiny_model, write_recipe, write_rows, write_tiny_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from remix_cli.core import BatchInputs, accumulate_gradients, make_estimator, plan_passes
from remix_cli.core.precondition import precondition_gradients
from remix_cli.core.store import load_stored
from remix_cli.core.trace import Trace
from remix_cli.data.batches import Order, collate, micro_batches
from remix_cli.data.rows import EncodedRow
from remix_cli.data.splits import load_data
from remix_cli.errors import ArtefactError
from remix_cli.integrations import RemixSFTTrainer, RemixTrainer, RouterTraining, get_remix_model
from remix_cli.models.losses import batch_losses
from remix_cli.recipe import load_recipe
from remix_cli.recipe.schema import Router as RouterRecipe
from remix_cli.train.micro_batch import accumulate_batch
from remix_cli.train.trainer import train

BEST_BY_LOSS = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}


def plain_gradients(count: int, config=CONFIG, router=ROUTER) -> dict[str, torch.Tensor]:
    """Of the first `count` rows by the library alone, as in examples/own_training_loop.py."""
    adapted = get_remix_model(tiny_model(dtype=torch.float64), config, seed=0)
    fill_adapter(adapted.adapter)
    batch = collate_features(feature_rows()[:count])
    mask, labels = batch["attention_mask"].bool(), batch["labels"]
    prompt = torch.zeros_like(mask)
    prompt[:, :4] = True

    def token_losses() -> torch.Tensor:
        logits = adapted.base_model(batch["input_ids"], attention_mask=mask).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none", ignore_index=-100)
        return torch.nn.functional.pad(losses, (0, 1)) / (labels[:, 1:] != -100).sum()

    inputs = BatchInputs(torch.arange(count), mask, prompt)
    passes = plan_passes(router.estimator, selections=router.selections, lora_gradient=router.lora_gradient)
    accumulate_gradients(adapted.adapter, token_losses, inputs, passes, make_estimator(router.estimator), seed=(0, 0))
    return {name: p.grad for name, p in adapted.adapter.parameters().items()}


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference, as a share of the largest value of its tensor."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp_min(1e-300)) for n in wanted)


@pytest.mark.parametrize("estimator", ["rtg", "control_variate", "straight_through"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_first_gradients_are_the_plain_loops(estimator, level, tmp_path):
    config = dataclasses.replace(CONFIG, level=level)
    router = dataclasses.replace(ROUTER, estimator=estimator, lora_gradient="top")
    found = gradients_of_trainer(tmp_path, config=config, router=router)
    assert worst(found, plain_gradients(4, config, router)) < 1e-6


def test_accumulation_changes_no_gradient(tmp_path):
    """Targets are counted over the whole step, and rows have one number each in it."""
    found = gradients_of_trainer(tmp_path, gradient_accumulation_steps=2)
    assert worst(found, plain_gradients(8)) < 1e-6


LAUNCHED = """
import sys
from accelerate import PartialState
from helpers.features import gradients_of_trainer
from safetensors.torch import save_file
found = gradients_of_trainer(sys.argv[1], per_device_train_batch_size=2, gradient_accumulation_steps=2)
if PartialState().is_main_process:
    save_file(found, sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_make_the_gradients_of_one(tmp_path):
    script, found = tmp_path / "launched.py", tmp_path / "gradients.safetensors"
    script.write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, tmp_path / "out", found], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    assert worst(load_file(found), plain_gradients(8)) < 1e-6


def test_loras_and_routers_are_clipped_apart(tmp_path):
    class Clipped(FirstGradients):
        def _clip_grad_norm(self, model):
            norm = RemixTrainer._clip_grad_norm(self, model)
            assert norm > 1e-3
            super()._clip_grad_norm(model)

    router = dataclasses.replace(ROUTER, max_grad_norm=1e-5)
    trainer = trainer_of(tmp_path, kind=Clipped, router=router, max_grad_norm=1e-3)
    fill_adapter(trainer.remix.adapter)
    with pytest.raises(Stops):
        trainer.train()
    routers = [g for name, g in trainer.gradients.items() if name.endswith("router")]
    loras = [g for name, g in trainer.gradients.items() if not name.endswith("router")]
    assert torch.nn.utils.get_total_norm(routers) == pytest.approx(1e-5, rel=0.01)
    assert torch.nn.utils.get_total_norm(loras) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("kind", ["riemannian", "riemannian_unit"])
def test_preconditioned_gradients_are_those_of_the_plain_loop_scaled(kind, tmp_path):
    class Preconditioned(FirstGradients):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, precondition=kind, **kwargs)

    trainer = trainer_of(tmp_path, kind=Preconditioned, model=tiny_model(dtype=torch.float64))
    adapter = trainer.remix.adapter
    fill_adapter(adapter)
    with pytest.raises(Stops):
        trainer.train()
    found = {name: gradient.clone() for name, gradient in trainer.gradients.items()}
    plain = plain_gradients(4)
    assert worst(found, plain) > 1e-2
    for name, parameter in adapter.parameters().items():
        parameter.grad = plain[name].to(parameter.dtype).clone()
    precondition_gradients(adapter, unit=kind == "riemannian_unit")
    assert worst(found, {name: parameter.grad for name, parameter in adapter.parameters().items()}) < 1e-4
    with pytest.raises(ValueError, match="'newton' is not known"):
        RemixTrainer(trainer.remix, precondition="newton")


def recipe(folder):
    rows_file = write_rows(folder / "rows.jsonl", 40)
    text = recipe_text(
        write_tiny_model(folder / "model"),
        rows_file,
        folder / "run",
        router={"estimator": "rtg", "learning_rate": 0.1, "init_std": 1.0},
        train={"max_steps": 10, "lr_scheduler_type": "constant", "learning_rate": 1e-2},
    )
    return load_recipe(write_recipe(folder / "recipe.yaml", text))


def in_training_order(recipe, tokenizer, steps: int) -> list[dict]:
    """The rows of `remix train`, as they come."""
    data = load_data(recipe, tokenizer, 1)
    order, made = Order(data.plan), []
    for step in range(steps):
        for _, part, _ in micro_batches(order.rows(step), data.train.lengths, 4, 0, 1):
            batch = collate([data.train.rows[i] for i in part])
            for ids, mask, row in zip(batch.input_ids, batch.mask, part, strict=True):
                supervised = torch.from_numpy(data.train.rows[row].supervised)
                labels = torch.full_like(ids, -100)
                labels[: len(supervised)][supervised] = ids[: len(supervised)][supervised]
                made.append(
                    {"input_ids": ids.tolist(), "attention_mask": mask.long().tolist(), "labels": labels.tolist()}
                )
    return made


def test_first_gradients_and_ten_steps_are_those_of_remix_train(tmp_path):
    wanted = recipe(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    data = in_training_order(wanted, tokenizer, 10)

    def base(dtype):
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)

    in_float64 = get_remix_model(base(torch.float64), wanted.adapter_config(), seed=wanted.seed)
    fill_adapter(in_float64.adapter)
    loaded = load_data(wanted, tokenizer, 1)
    (cut,) = micro_batches(Order(loaded.plan).rows(0), loaded.train.lengths, 4, 0, 1)
    batch = collate([loaded.train.rows[i] for i in cut[1]])
    accumulate_batch(
        in_float64.base_model,
        in_float64.adapter,
        batch,
        wanted.router,
        make_estimator("rtg"),
        targets_in_step=float(len(batch.targets)),
        seed=(wanted.seed, 0),
        numbers={},
        backward=torch.Tensor.backward,
    )
    gradients = {name: p.grad for name, p in in_float64.adapter.parameters().items()}
    options = {"config": wanted.adapter_config(), "router": ROUTER, "data": data, "seed": wanted.seed}
    assert worst(gradients_of_trainer(tmp_path / "first", model=base(torch.float64), **options), gradients) < 1e-6

    train(wanted, Console(quiet=True))
    trainer = trainer_of(tmp_path / "ten", model=base(torch.float32), max_steps=10, **options)
    trainer.train()
    stored = load_stored(tmp_path / "run" / "adapter")
    assert stored.config == trainer.remix.adapter.config
    for name, tensor in trainer.remix.adapter.tensors().items():
        one_step = 0.1 if name.endswith("router") else 0.01  # AdamW moves a number by about its rate
        torch.testing.assert_close(tensor, stored.tensors[name], rtol=0, atol=0.01 * one_step)


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, level="sequence", clusters=3)])
def test_a_resumed_run_is_an_unbroken_one(config, tmp_path):
    router = dataclasses.replace(ROUTER, estimator="control_variate")  # which learns a number
    unbroken = trainer_of(tmp_path / "a", config=config, router=router)
    unbroken.train()
    trainer_of(tmp_path / "b", config=config, router=router, max_steps=2).train()
    resumed = trainer_of(tmp_path / "b", config=config, router=router)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for name, tensor in resumed.remix.adapter.tensors().items():
        assert torch.equal(tensor, unbroken.remix.adapter.tensors()[name]), name


def test_another_estimator_is_no_resumption(tmp_path):
    trainer_of(tmp_path).train()
    with pytest.raises(ValueError, match="was trained by rtg; set"):
        trainer_of(tmp_path, router=RouterTraining(estimator="paper")).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(ArtefactError, match="damaged"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_recomputed_activations_change_nothing(tmp_path):
    plain = trainer_of(tmp_path / "a")
    plain.train()
    recomputed = trainer_of(tmp_path / "b", gradient_checkpointing=True)
    assert recomputed.model.is_gradient_checkpointing
    recomputed.train()
    for name, tensor in recomputed.remix.adapter.tensors().items():
        assert torch.equal(tensor, plain.remix.adapter.tensors()[name]), name


def test_under_autocast_gradients_are_those_of_float32_to_bfloat16s_precision(tmp_path):
    options = {"router": dataclasses.replace(ROUTER, fixed=True)}  # other selections would be another gradient
    wanted = trainer_of(tmp_path / "a", kind=FirstGradients, **options)
    narrow = trainer_of(tmp_path / "b", kind=FirstGradients, bf16=True, **options)
    for trainer in (wanted, narrow):
        with pytest.raises(Stops):
            trainer.train()
    for name, gradient in narrow.gradients.items():
        if name.endswith("lora_B"):
            assert (gradient - wanted.gradients[name]).norm() < 0.02 * wanted.gradients[name].norm(), name
    assert {p.dtype for p in narrow.remix.adapter.parameters().values()} == {torch.float32}


def test_the_log_says_how_the_routers_choose_and_the_rates_are_apart(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    logged = [record for record in trainer.state.log_history if "loss" in record]
    assert len(logged) == 4
    for record in logged:
        assert 0 < record["router_entropy"] <= 1.4
        assert record["ess_weights"] == 2.0
        assert record["router_grad_norm"] >= 0
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2, 0.1]


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    trainer = trainer_of(tmp_path, metric_for_best_model="eval_loss", greater_is_better=True, **BEST_BY_LOSS)
    trainer.train()
    best = load_stored(tmp_path / f"checkpoint-{trainer.state.best_global_step}").tensors
    assert trainer.state.best_global_step == 2  # the worst, as greater is better
    for name, tensor in trainer.remix.adapter.tensors().items():
        assert torch.equal(tensor, best[name]), name


def test_a_fixed_router_is_one_pass_and_stays(tmp_path):
    trainer = trainer_of(tmp_path, router=RouterTraining(fixed=True))
    before = {name: p.clone() for name, p in trainer.remix.adapter.router_parameters().items()}
    trainer.train()
    assert trainer.passes.total == 1
    for name, parameter in trainer.remix.adapter.router_parameters().items():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("kind", [RemixTrainer, Trainer])
def test_a_base_in_four_bits_is_trained_like_any_other(kind, tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, device_map="cpu")
    if kind is Trainer:  # what the compatibility is for
        with pytest.raises(ValueError, match="purely quantized"):
            Trainer(base, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
        return
    trainer = trainer_of(tmp_path / "out", kind=RemixTrainer, model=base)
    before = {name: p.clone() for name, p in trainer.remix.adapter.parameters().items()}
    trainer.train()
    assert {p.dtype for p in trainer.remix.adapter.parameters().values()} == {torch.float32}
    assert all(not torch.equal(p, before[name]) for name, p in trainer.remix.adapter.parameters().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: not with routed adapters; leave it at 0"),
        ({"torch_compile": True}, "torch_compile: not with"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **changes)


OF_A_WHOLE_MODEL = ("galore", "apollo", "lomo", "adalomo")
COMES_IN_A_PACKAGE = {  # the module that transformers imports for an optimizer which torch does not have
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "grokadamw": "grokadamw",
    "schedule_free_radam": "schedulefree",
    "schedule_free_adamw": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "stable_adamw": "optimi",
}


@pytest.mark.parametrize("optim", [kind.value for kind in OptimizerNames])
def test_every_optimizer_of_transformers_trains_both_groups_or_is_refused(optim, tmp_path):
    """The partition is written down here, so that a new one of transformers must be put into it."""
    options = {"optim": optim, "max_steps": 8, "save_strategy": "no"}
    module = COMES_IN_A_PACKAGE.get(optim)
    why = "is made of a whole model" if optim.startswith(OF_A_WHOLE_MODEL) else ""
    if module and importlib.util.find_spec(module) is None:
        why = "is not to be had here"
    if why:
        with pytest.raises(ValueError, match=rf"^optim: {optim} {why}.*adamw_torch") as refused:
            trainer_of(tmp_path, **options)
        assert "\n" not in str(refused.value)
        return
    trainer = trainer_of(tmp_path, **options)
    fill_adapter(trainer.remix.adapter)  # so that no gradient is zero
    before = {name: p.clone() for name, p in trainer.remix.adapter.parameters().items()}
    trainer.train()
    assert [float(group["lr"]) for group in trainer.optimizer.param_groups] == pytest.approx([1e-2, 0.1])
    for name, parameter in trainer.remix.adapter.parameters().items():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name


class TrainsElsewhere(torch.optim.SGD):
    """As schedule-free optimizers do: while it trains, weights stand 1 beside those that are meant."""

    def _shift(self, training: bool) -> None:
        for group in self.param_groups:
            if group.setdefault("train_mode", False) != training:
                group["train_mode"] = training
                for parameter in group["params"]:
                    parameter.data += 1 if training else -1

    def train(self):
        self._shift(True)

    def eval(self):
        self._shift(False)


def test_what_is_saved_is_what_is_evaluated(tmp_path):
    kind = partial(InOrder, optimizer_cls_and_kwargs=(TrainsElsewhere, {"lr": 1e-3}))
    trainer = trainer_of(tmp_path, kind=kind, router=dataclasses.replace(ROUTER, learning_rate=1e-3))
    trainer.train()
    for step in (2, 4):
        for name, tensor in load_stored(tmp_path / f"checkpoint-{step}").tensors.items():
            if name.endswith("lora_B"):  # which began at zero
                assert tensor.abs().max() < 0.1, (step, name)
    resumed = trainer_of(tmp_path, kind=kind, router=trainer.router)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in resumed.remix.adapter.tensors().items():
        assert torch.equal(tensor, trainer.remix.adapter.tensors()[name]), name


def test_an_optimizer_of_ones_own_takes_the_groups_too(tmp_path):
    """torch's Muon, which transformers has no name for; and what makes one of a whole model is refused."""
    trainer = trainer_of(tmp_path, kind=partial(InOrder, optimizer_cls_and_kwargs=(torch.optim.Muon, {"lr": 1e-2})))
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2, 0.1]
    with pytest.raises(ValueError, match=r"^optimizer_cls_and_kwargs: .* is made of a whole model"):
        trainer_of(tmp_path, kind=partial(InOrder, optimizer_cls_and_kwargs=(lambda: torch.optim.SGD, {"lr": 1e-2})))


def test_a_model_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="get_remix_model"):
        RemixTrainer(tiny_model(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


def test_a_subclass_of_the_trainer_becomes_one(tmp_path):
    class Counting(Trainer):
        seen = 0

        def log(self, *args, **kwargs):
            self.seen += 1
            super().log(*args, **kwargs)

    class Both(RemixTrainer, Counting):
        pass

    trainer = trainer_of(tmp_path, kind=Both)
    trainer.train()
    assert trainer.seen >= 4


# TRL


def sft_trainer(folder, data, config=CONFIG, **changes):
    model = write_tiny_model(folder / "model")
    adapted = get_remix_model(AutoModelForCausalLM.from_pretrained(model), config)
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2, "learning_rate": 1e-2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "output_dir": str(folder / "out"), "bf16": False}
    return RemixSFTTrainer(
        adapted,
        SFTConfig(**(settings | quiet | changes)),
        router=ROUTER,
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:8]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def test_the_example_learns_and_its_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import trl_sft

    losses = trl_sft.main(str(tmp_path), steps=30)
    assert losses[-1] < losses[0] - 0.2
    assert load_stored(tmp_path).config.pool_size == 8


def test_the_defaults_are_a_recipes():
    router = RouterRecipe()
    for field in dataclasses.fields(RouterTraining):
        assert getattr(RouterTraining(), field.name) == getattr(router, field.name)


PAIRS = [{"prompt": f"w{i} w{i + 1} ?", "completion": f"w{i + 2} w{i + 3}"} for i in range(30)]
MESSAGES = [
    {"messages": [{"role": "user", "content": f"w{i} ?"}, {"role": "assistant", "content": f"w{i + 1}"}]}
    for i in range(30)
]


@pytest.mark.parametrize(
    ("data", "changes", "config"),
    [
        (PAIRS, {}, CONFIG),
        (MESSAGES, {"packing": True, "max_length": 32}, CONFIG),
        (PAIRS, {}, dataclasses.replace(CONFIG, level="sequence", clusters=4)),
        (PAIRS, {"bf16": True}, CONFIG),
    ],
    ids=["pairs", "packed", "clusters", "bfloat16"],
)
def test_trl_trains_saves_and_evaluates(data, changes, config, tmp_path):
    trainer = sft_trainer(tmp_path, data, config, **changes)
    before = {name: p.clone() for name, p in trainer.remix.adapter.parameters().items()}
    trainer.train()
    for name, parameter in trainer.remix.adapter.parameters().items():
        assert not torch.equal(parameter, before[name]), name
    measured = trainer.evaluate()
    assert 0 < measured["eval_loss"] < 5
    assert 0 <= measured["eval_mean_token_accuracy"] <= 1
    stored = load_stored(tmp_path / "out" / "checkpoint-4")
    assert stored.config == config
    if config.clusters:
        assert all(router.centres.norm() > 0 for router in trainer.remix.adapter.routers.values())


def test_packed_rows_have_no_one_prompt(tmp_path):
    config = dataclasses.replace(CONFIG, level="sequence")
    trainer = sft_trainer(tmp_path, MESSAGES, config, packing=True, max_length=32)
    with pytest.raises(ValueError, match="packing: several sequences in a row"):
        trainer.train()


def test_the_loss_of_an_evaluation_is_batch_losses(tmp_path):
    """The held-out loss of a routed model by sequence needs the prompts, as training does."""
    config = dataclasses.replace(CONFIG, level="sequence")
    trainer = trainer_of(tmp_path, config=config)
    trainer.train()
    measured = trainer.evaluate()["eval_loss"]
    losses = []
    for row in feature_rows()[:4]:
        real = sum(row["attention_mask"])
        ids, labels = np.array(row["input_ids"][:real]), np.array(row["labels"][:real])
        batch = collate([EncodedRow(ids, labels != -100, "t")])
        with torch.no_grad(), trainer.remix.adapter.tracing(Trace(prompt=batch.prompt)):
            losses.append(batch_losses(trainer.model, batch))
    total = sum(float(part.sum()) for part in losses)
    count = sum(int((part != 0).sum()) for part in losses)
    assert measured == pytest.approx(total / count, rel=1e-5)
