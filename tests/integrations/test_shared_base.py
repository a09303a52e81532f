"""RemixTrainer under accelerate's launch file for FSDP2: the frozen base is shared out, the adapter whole."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from helpers.common import ROOT
from helpers.features import CONFIG, ROUTER, InOrder, gradients_of_trainer, trainer_of
from helpers.tiny import fill_adapter, write_tiny_model
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig

from remix_cli.compat.accelerate import FsdpLaunch
from remix_cli.core.store import load_stored
from remix_cli.integrations import RemixModel, RemixSFTTrainer, get_remix_model, trainer

SEQUENCE = dataclasses.replace(CONFIG, level="sequence", clusters=3)


def base_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokenizer_of(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def four_bit_trainer(out: Path, folder: Path, **changes):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    made = trainer_of(out, model=base, **changes)
    fill_adapter(made.remix.adapter)
    return made


def trainer_in(folder, base, model, **changes):
    class Named(InOrder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, processing_class=tokenizer_of(base), **kwargs)

    halves = {"per_device_train_batch_size": 2, "config": SEQUENCE, "eval_strategy": "steps", "eval_steps": 2}
    made = trainer_of(folder, kind=Named, model=model, **(halves | changes))
    assert isinstance(made.model.model.layers[0].mlp.up_proj.base_layer.weight, DTensor)
    assert isinstance(made.model.lm_head.weight, DTensor)
    assert not any(isinstance(p, DTensor) for p in made.remix.adapter.parameters().values())
    return made


def launched(base: Path, out: Path) -> None:
    """What each of the two processes does."""
    rank = PartialState(cpu=True).process_index
    # 1. A run with evaluations and checkpoints, of a base that the second process has without memory.
    first = base_of(base).to("meta" if rank else "cpu")
    whole = trainer_in(out / "whole", base, first)
    whole.train()
    losses = [record["eval_loss"] for record in whole.state.log_history if "eval_loss" in record]
    assert len(losses) == 2
    assert losses[-1] == whole.evaluate()["eval_loss"]
    loaded = RemixModel.from_pretrained(base_of(base).to("meta" if rank else "cpu"), out / "whole" / "checkpoint-4")
    assert loaded.adapter.config == SEQUENCE

    # 2. The same, stopped and resumed.
    trainer_in(out / "again", base, base_of(base), max_steps=2).train()
    resumed = trainer_in(out / "again", base, base_of(base))
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in resumed.remix.adapter.tensors().items():
        assert tensor.equal(whole.remix.adapter.tensors()[name]), name

    # 3. The first gradients, in float64.
    found = gradients_of_trainer(out / "gradients", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    if rank == 0:
        save_file(found, out / "gradients.safetensors")

    # 4. TRL.
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 1} ?", "completion": f"w{i + 2} w{i + 3}"} for i in range(30)])
    settings = SFTConfig(
        output_dir=str(out / "trl"), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False
    )
    adapted = get_remix_model(base_of(base), CONFIG)
    sft = RemixSFTTrainer(adapted, settings, router=ROUTER, train_dataset=rows, processing_class=tokenizer_of(base))
    sft.train()
    assert isinstance(sft.model.lm_head.weight, DTensor)

    # 5. A base in four bits.
    four = four_bit_trainer(out / "four", base, per_device_train_batch_size=2)
    assert isinstance(four.model.model.layers[0].mlp.up_proj.base_layer.weight, DTensor)
    four.train()
    if rank == 0:
        (out / "losses").write_text(f"{losses}")
    print(f"rank {rank}: through")


def launch_file(folder: Path, offload: bool) -> Path:
    described = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())
    described["fsdp_config"]["fsdp_offload_params"] = offload
    (folder / "launch.yaml").write_text(yaml.safe_dump(described))
    return folder / "launch.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_two_processes_that_share_the_base_do_what_one_does(offload, tmp_path):
    """Gradients to 1e-6; the adapter after four steps to a hundredth of one; resuming to the bit; four bits."""
    model, out = write_tiny_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch_file(tmp_path, offload)]
    command += ["--num_processes", "2", "--main_process_port", "0", __file__, model, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0: through" in done.stdout
    assert "rank 1: through" in done.stdout

    wanted = gradients_of_trainer(tmp_path / "one", gradient_accumulation_steps=2)
    found = load_file(out / "gradients.safetensors")
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name

    one = trainer_of(tmp_path / "alone", model=base_of(model), config=SEQUENCE)
    one.train()
    four = four_bit_trainer(tmp_path / "four", model)
    four.train()
    for folder, alone in (("whole", one), ("four", four)):
        stored = load_stored(out / folder / "checkpoint-4")
        for name, tensor in alone.remix.adapter.tensors().items():
            one_step = 0.1 if name.endswith("router") else 0.01  # AdamW moves a number by about its rate
            torch.testing.assert_close(stored.tensors[name], tensor, rtol=0, atol=0.01 * one_step)
    assert json.loads((out / "losses").read_text())[-1] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-5)

    read = RemixModel.from_pretrained(base_of(model), out / "whole" / "checkpoint-4", tokenizer=tokenizer_of(model))
    assert read.adapter.config == SEQUENCE
    assert load_stored(out / "trl" / "checkpoint-2").config == CONFIG


@pytest.mark.parametrize(
    ("launch", "settings", "message"),
    [
        (FsdpLaunch(version=1, offload=False), {}, "fsdp_version: not with routed adapters; set it to 2"),
        (FsdpLaunch(version=2, offload=False), {}, "FSDP: not with routed adapters; one process has nobody"),
        (
            FsdpLaunch(version=2, offload=False),
            {"accelerator_config": {"even_batches": False}},
            "even_batches: not with routed adapters; leave it at True",
        ),
    ],
)
def test_launches_that_cannot_be_kept_are_refused(launch, settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "fsdp_launch", lambda: launch)
    if settings:  # of which several processes would be told
        monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, router=ROUTER, **settings)


if __name__ == "__main__":
    launched(Path(sys.argv[1]), Path(sys.argv[2]))
