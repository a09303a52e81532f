"""The axolotl plug-in: with a stand-in for axolotl that makes its calls in its order; and axolotl itself where it is
installed, which is in an environment of its own, for its requirements are exact versions."""

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types

import pytest
import torch
import yaml
from helpers.common import ROOT
from helpers.features import collate_features, feature_rows
from helpers.tiny import tiny_model, write_tiny_model
from pydantic import BaseModel, ValidationError
from transformers import AutoTokenizer, Trainer, TrainingArguments

from remix_cli.core.store import load_stored
from remix_cli.errors import ArtefactError
from remix_cli.integrations import AdapterConfig, RemixModel, RemixTrainer, RouterTraining, get_remix_model

PLUGIN = "remix_cli.integrations.axolotl"
INSTALLED = importlib.util.find_spec("axolotl") is not None
needs_axolotl = pytest.mark.skipif(not INSTALLED, reason="axolotl is not installed; give it an environment of its own")
GIVEN = {
    "adapter": "remix",
    "remix": {"adapter": {"pool_size": 4, "active": 2, "rank": 3}, "router": {"selections": 2, "learning_rate": 0.1}},
    "lora_dropout": 0.0,  # axolotl's own default wherever there is an adapter
    "load_in_4bit": False,
    "seed": 3,
    "local_rank": 0,
}
SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


class BasePlugin:
    """The hooks of axolotl 0.19 that the plug-in answers, as they are declared there."""

    def get_input_args(self): ...
    def get_adapter_capabilities(self): ...
    def load_adapter(self, model, cfg, inference=False, config_only=False): ...
    def get_trainer_cls(self, cfg): ...
    def post_trainer_create(self, cfg, trainer): ...
    def get_training_args(self, cfg): ...
    def post_train(self, cfg, model): ...


class AdapterCapabilities:
    def __init__(self, name, lora_like=False, relora=False):
        self.name, self.lora_like, self.relora = name, lora_like, relora


class AxolotlTrainer(Trainer):
    """What matters of axolotl's: arguments of its own, and a mark that it takes away from the Trainer."""

    def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataset_tags = dataset_tags
        self.model_accepts_loss_kwargs = False

    def training_step(self, *args, **kwargs):
        raise AssertionError("an ordinary step, without selections")


class Config(dict):
    """As axolotl's: a key that is absent is None."""

    def __getattr__(self, name):
        return self.get(name)


@pytest.fixture
def axolotl(monkeypatch):
    """The plug-in's module, imported beside the stand-in."""
    held = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin, "AdapterCapabilities": AdapterCapabilities},
        "axolotl.core": {},
        "axolotl.core.trainers": {"AxolotlTrainer": AxolotlTrainer},
    }
    for name, names in held.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    yield importlib.import_module(PLUGIN)
    sys.modules.pop(PLUGIN, None)


def config(plugin_module, folder, **changes) -> Config:
    """As axolotl makes it of a YAML: its own model and the plug-in's as one, written out without what is None."""

    class Own(BaseModel):
        adapter: str
        seed: int = 0
        local_rank: int = 0
        lora_model_dir: str | None = None
        output_dir: str = str(folder)

    merged = type("Merged", (Own, plugin_module.RemixArgs), {})
    return Config(merged(**(GIVEN | changes)).model_dump(exclude_none=True))


def trainer_of(plugin, cfg, model, folder, tokenizer=None, **changes):
    """axolotl's builder: these arguments, then the plug-in's; the class is called with what axolotl has."""
    settings = SETTINGS | {"output_dir": str(folder), "average_tokens_across_devices": False}
    kind = plugin.get_trainer_cls(cfg)
    trainer = kind(
        model=model,
        train_dataset=feature_rows(),
        eval_dataset=feature_rows(4),
        args=TrainingArguments(**(settings | plugin.get_training_args(cfg))),
        data_collator=collate_features,
        eval_data_collator=collate_features,
        dataset_tags=["rows"],
        processing_class=tokenizer,
        **changes,
    )
    plugin.post_trainer_create(cfg, trainer)
    return trainer


def test_a_run_in_axolotls_order(axolotl, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path / "model"))
    plugin = axolotl.RemixPlugin()
    cfg = config(axolotl, tmp_path / "out")
    base = tiny_model()
    base.enable_input_require_grads()  # as axolotl does before it asks plug-ins
    model, peft_config = plugin.load_adapter(base, cfg)
    assert peft_config is None
    assert not base.get_input_embeddings()._forward_hooks
    assert model.adapter.config == AdapterConfig(pool_size=4, active=2, rank=3)
    drawn = get_remix_model(tiny_model(), model.adapter.config, seed=3).adapter.parameters()
    for name, parameter in model.adapter.parameters().items():
        assert torch.equal(parameter, drawn[name]), name

    trainer = trainer_of(plugin, cfg, model, tmp_path / "out", tokenizer)
    assert isinstance(trainer, RemixTrainer)
    assert isinstance(trainer, AxolotlTrainer)
    assert trainer.dataset_tags == ["rows"]
    assert trainer.router == RouterTraining(selections=2, learning_rate=0.1)
    trainer.train()
    plugin.post_train(cfg, trainer.model)
    assert not list((tmp_path / "out").glob("*.safetensors"))  # axolotl has not saved yet; nor is the base its to save
    for name, parameter in model.adapter.parameters().items():
        assert not torch.equal(parameter, drawn[name]), name

    model.save_pretrained(tmp_path / "out")  # axolotl's own call
    plugin.post_train(cfg, model)
    read = RemixModel.from_pretrained(tiny_model(), tmp_path / "out", tokenizer=tokenizer)
    for name, parameter in read.adapter.parameters().items():
        assert torch.equal(parameter, model.adapter.parameters()[name]), name
    tokenizer.add_tokens(["w99"])
    with pytest.raises(ArtefactError, match="another tokenizer"):
        RemixModel.from_pretrained(tiny_model(), tmp_path / "out", tokenizer=tokenizer)
    assert load_stored(tmp_path / "out" / "checkpoint-4").config == model.adapter.config


def test_its_steps_are_those_of_the_trainer(axolotl, tmp_path):
    """The same loss and adapter as RemixTrainer alone, to the bit, whatever axolotl's builder sets."""
    cfg, plugin = config(axolotl, tmp_path), axolotl.RemixPlugin()
    model, _ = plugin.load_adapter(tiny_model(), cfg)
    trainer_of(plugin, cfg, model, tmp_path / "a").train()

    alone = get_remix_model(tiny_model(), AdapterConfig(pool_size=4, active=2, rank=3), seed=3)
    router = RouterTraining(selections=2, learning_rate=0.1)
    args = TrainingArguments(**SETTINGS, output_dir=str(tmp_path / "b"))
    RemixTrainer(alone, args, router=router, train_dataset=feature_rows(), data_collator=collate_features).train()
    for name, parameter in alone.adapter.parameters().items():
        assert torch.equal(parameter, model.adapter.parameters()[name]), name


def test_a_yaml_that_says_nothing_of_the_router_leaves_it_as_the_trainer_does(axolotl, tmp_path):
    cfg, plugin = config(axolotl, tmp_path, remix={"adapter": {"pool_size": 4, "active": 2}}), axolotl.RemixPlugin()
    model, _ = plugin.load_adapter(tiny_model(), cfg)
    args = TrainingArguments(**SETTINGS, output_dir=str(tmp_path))
    alone = RemixTrainer(get_remix_model(tiny_model(), AdapterConfig()), args, train_dataset=feature_rows())
    assert trainer_of(plugin, cfg, model, tmp_path).router == alone.router


def test_an_optimizer_class_that_the_builder_gives_is_used(axolotl, tmp_path):
    cfg, plugin = config(axolotl, tmp_path), axolotl.RemixPlugin()
    model, _ = plugin.load_adapter(tiny_model(), cfg)
    given = (torch.optim.SGD, {"lr": 0.01, "momentum": 0.5})
    trainer = trainer_of(plugin, cfg, model, tmp_path, optimizer_cls_and_kwargs=given)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(0.01, 0.5), (0.1, 0.5)]


def test_a_trained_adapter_is_gone_on_with(axolotl, tmp_path):
    plugin = axolotl.RemixPlugin()
    cfg = config(axolotl, tmp_path / "out", lora_model_dir=str(tmp_path))
    first, _ = plugin.load_adapter(tiny_model(), config(axolotl, tmp_path))
    first.save_pretrained(tmp_path)
    again, _ = plugin.load_adapter(tiny_model(), cfg)
    assert again.training
    assert all(parameter.requires_grad for parameter in again.adapter.parameters().values())
    answers, _ = plugin.load_adapter(tiny_model(), cfg, inference=True)
    assert not any(parameter.requires_grad for parameter in answers.parameters())
    other = config(axolotl, tmp_path, lora_model_dir=str(tmp_path), remix={"adapter": {"rank": 5}})
    with pytest.raises(ValueError, match=r"remix\.adapter: not what .* holds"):
        plugin.load_adapter(tiny_model(), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "lora"}, "adapter: set it to remix"),
        ({"adapter": None}, "adapter: set it to remix"),
        ({"lora_r": 8, "rl": "dpo"}, "lora_r: .*remix.adapter.rank; rl: .*cross-entropy"),
        ({"load_in_4bit": True}, "load_in_4bit: .*overrides_of_model_kwargs"),
        ({"optimizer": "muon"}, "optimizer: muon"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: .*leave it at 1"),
        ({"remix": {"adapter": {"rnk": 3}}}, "adapter.rnk"),
        ({"remix": {"adapter": {"virtual_tokens": 3}}}, "adapter.virtual_tokens"),
        ({"remix": {"router": {"selection": 3}}}, "router.selection"),
        ({"remix": {"adapter": {"pool_size": 4, "active": 9}}}, "active .9. must lie between"),
        ({"remix": {"adaptor": {}}}, "adaptor"),
    ],
)
def test_what_would_be_ignored_is_refused_when_the_yaml_is_read(axolotl, changes, message, tmp_path):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        config(axolotl, tmp_path, **changes)


def test_the_names_by_which_axolotl_finds_things(axolotl):
    plugin = axolotl.RemixPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    assert getattr(importlib.import_module(module), name) is axolotl.RemixArgs
    [capability] = plugin.get_adapter_capabilities()
    assert (capability.name, capability.lora_like) == ("remix", False)


def test_the_example_is_taken(axolotl, tmp_path):
    text = (ROOT / "examples" / "axolotl.yaml").read_text(encoding="utf-8")
    given = yaml.safe_load(text)
    assert given["plugins"] == [f"{PLUGIN}.{axolotl.RemixPlugin.__name__}"]
    assert axolotl.RemixArgs(**given).remix.adapter_config().pool_size == 8


@needs_axolotl
def test_the_stand_in_is_like_axolotl():
    """Its hooks and its trainer's arguments; and the keys that the plug-in refuses are keys there."""
    module = importlib.import_module(PLUGIN)
    base = importlib.import_module("axolotl.integrations.base")
    trainers = importlib.import_module("axolotl.core.trainers")
    schema = importlib.import_module("axolotl.utils.schemas.config").AxolotlInputConfig
    for name, hook in inspect.getmembers(BasePlugin, inspect.isfunction):
        theirs = list(inspect.signature(getattr(base.BasePlugin, name)).parameters)
        assert list(inspect.signature(hook).parameters) == theirs, name
        assert list(inspect.signature(getattr(module.RemixPlugin, name)).parameters) == theirs, name
    own = {"bench_data_collator", "eval_data_collator", "dataset_tags"}
    assert own <= set(inspect.signature(trainers.AxolotlTrainer.__init__).parameters)
    of_plugins = {"expert_parallel_size"}
    assert {*module.KEYS, *module.SPREADS_ONE_MODEL} <= {*schema.model_fields, *of_plugins}
    assert base.AdapterCapabilities(name="remix").lora_like is False


@pytest.mark.slow
@needs_axolotl
def test_axolotl_trains_the_example_and_resumes_to_the_same_bits(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"w{i} ?"}, {"role": "assistant", "content": f"w{i + 1}"}]}
            for i in range(39)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tiny_model(tmp_path / "model")
    given = yaml.safe_load((ROOT / "examples" / "axolotl.yaml").read_text(encoding="utf-8"))
    steps = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "evals_per_epoch": None, "saves_per_epoch": None}
    made_here = {"base_model": "model", "output_dir": "out", "bf16": False, "special_tokens": {"pad_token": "<pad>"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(given | made_here | steps))

    def train(*more: str) -> bytes:
        command = [sys.executable, "-m", "axolotl.cli.main", "train", "tiny.yaml", "--launcher", "python", *more]
        quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | quiet, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return (tmp_path / "out" / "adapter.safetensors").read_bytes()

    unbroken = train()
    (tmp_path / "out" / "adapter.safetensors").unlink()
    assert train("--resume-from-checkpoint", "out/checkpoint-2") == unbroken
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    RemixModel.from_pretrained(tiny_model(), tmp_path / "out", tokenizer=tokenizer)
