"""Every verb for a few steps on the real demo model, through the installed console script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, close

pytestmark = pytest.mark.model


def remix(*arguments, cwd=ROOT):
    script = Path(sys.executable).with_name("remix")
    done = subprocess.run(
        [str(script), *map(str, arguments)], capture_output=True, text=True, timeout=280, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(demo_model, tmp_path_factory):
    """A few steps of the quickstart recipe."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    remix(
        "train",
        "configs/quickstart.yaml",
        f"output_dir={folder}",
        "train.max_steps=6",
        "train.per_device_train_batch_size=2",
        "train.eval_steps=6",
        "train.save_steps=3",
        "data.validation_limit=8",
    )
    return folder


def test_training_lowers_the_held_out_loss(run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    assert len(held) == 2
    assert held[-1] < 0.95 * held[0]


@pytest.mark.slow
def test_eval_of_loss_and_of_generated_answers(run, tmp_path):
    rows = [{"question": f"What is {a} + 2?", "answer": f"It is {a + 2}.\n#### {a + 2}"} for a in range(4)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = ("--task", "nll", "--task", "gsm8k", "--data-format", "gsm8k")
    report = json.loads(remix("eval", run, *tasks, "--data", data, "--max-new-tokens", 16, "--json"))
    loss, answers = report["results"]
    assert 0 < loss["scores"]["loss"] < 10
    assert answers["count"] == 4
    lines = (run / "eval" / "adapter-gsm8k@sums.jsonl").read_text().splitlines()
    assert all(json.loads(line)["output"].strip() for line in lines)


@pytest.mark.slow
def test_route_stats_cover_all_blocks(run):
    report = json.loads(remix("route-stats", run, "--limit", 4, "--json"))
    assert len(report["blocks"]) == 30
    for block in report["blocks"]:
        assert sum(block["share"]) == pytest.approx(4)
        assert block["ess_weights"] == pytest.approx(4, rel=1e-5)
        assert 1 <= block["ess_q_worst"] <= block["ess_q"] <= 8 + 1e-6


@pytest.mark.slow
def test_export_writes_eight_loras_and_the_router(run, tmp_path):
    remix("export", run, "--format", "peft-experts", "--output", tmp_path / "experts")
    assert len(list((tmp_path / "experts").glob("lora-*/adapter_model.safetensors"))) == 8
    assert (tmp_path / "experts" / "router.safetensors").is_file()


def test_chat_rows_end_with_the_end_token_supervised(demo_model):
    """The demo tokenizer pads with its end token; the answer's end must still be learnt, and the prompt not."""
    from remix_cli.data.batches import collate
    from remix_cli.data.encode import Encoder
    from remix_cli.data.formats import Example
    from remix_cli.models import batch_losses, load_model, load_tokenizer
    from remix_cli.recipe.schema import Model

    model = Model(name_or_path=str(demo_model), dtype="float32")
    tokenizer = load_tokenizer(model)
    turns = [({"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": w}) for w in ("yes", "oh no")]
    rows = Encoder(tokenizer, 128, None).encode_rows([Example(t, "t") for t in turns]).rows
    batch = collate(rows)
    assert tokenizer.decode(batch.targets) == "yes<|im_end|>oh no<|im_end|>"
    base = load_model(model, torch.device("cpu"))
    with torch.no_grad():
        ours = batch_losses(base, batch)
        logits = base(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch.positions], batch.targets, reduction="none")
    assert close(ours.flatten()[batch.positions], expected, 1e-5)
