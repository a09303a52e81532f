"""Runs that are killed, stopped or poisoned: rows K*, N*, L* of docs/reliability.md."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT
from helpers.runs import run, small, start_cli
from helpers.tiny import recipe_text, write_recipe
from rich.console import Console
from safetensors.torch import load_file, save_file

from remix_cli.errors import DivergedError, Interrupted
from remix_cli.storage import lock_folder, recover
from remix_cli.train import checkpoints, micro_batch, setup, trainer


def laboratory(*arguments) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests" / "faults" / "faultlab.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finding(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return json.loads(out)


def test_K1_50_kills_at_random_instants_change_no_bit():
    """Half of them while a file is being written. 2,000 by `make kills`."""
    found = [finding(p) for p in [laboratory("kills", 25, seed) for seed in (1, 2)]]
    assert sum(f["kills"] for f in found) == 50
    assert sum(f["while_writing"] for f in found) > 10
    for f in found:
        assert f["finished"]  # how many depends on the machine's pace
        assert (f["mismatches"], f["lost"], f["errors"]) == (0, 0, 0), f


def test_K2_S1_S4_at_every_28th_file_changing_call():
    """A kill, or a disk that refuses, at calls 1, 29, 57 ... of evaluations with a new best, saves and prunings
    (one checkpoint is kept: K12). All of them by `make kills`."""
    killed, starved = [finding(p) for p in [laboratory("points", 28), laboratory("errors", 28)]]
    for f in (killed, starved):
        assert f["points"] >= 5
        assert (f["mismatches"], f["lost"], f["wrong_exit"], f["scratch_left"]) == (0, 0, 0, 0), f


@pytest.mark.slow
def test_K7_K8_signals_at_random_instants():
    """SIGTERM and Ctrl-C: exit 143 or 130, or the signal itself before the run begins; the resumed run is the same."""
    f = finding(laboratory("signals", 6))
    assert f["signals"] == 6
    assert f["saved"] > 1
    assert (f["mismatches"], f["lost"], f["wrong_exit"]) == (0, 0, 0), f


def wait_for(path: Path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


@pytest.fixture
def long_recipe(stage, tmp_path):
    """Thousands of steps: something is always running when a signal arrives."""
    model, rows, _ = stage
    train = {"max_steps": 100_000, "save_steps": 5, "eval_steps": None, "logging_steps": 1000}
    return write_recipe(tmp_path / "r.yaml", recipe_text(model, rows, "out", train=train))


def test_K7_M1_sigterm_and_a_second_run_in_the_same_folder(long_recipe):
    """A real process: the second is refused at once and names the first; SIGTERM saves and says how to go on."""
    first = start_cli(long_recipe)
    folder = long_recipe.parent / "out"
    wait_for(folder / "checkpoints" / "step-000005")
    second = start_cli(long_recipe, "--resume")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 6
    assert re.fullmatch(rf"error: out: in use by process {first.pid}\n", err)
    first.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    _, err = first.communicate(timeout=60)
    assert time.monotonic() - begun < 5
    assert first.returncode == 143
    assert re.fullmatch(r"error: interrupted after step \d+; go on with: remix train out/recipe.yaml --resume\n", err)
    step = int(re.search(r"step (\d+)", err).group(1))
    assert checkpoints.verify(folder / "checkpoints" / f"step-{step:06d}") is None
    with lock_folder(folder):  # the kernel freed it
        pass


def test_K8_a_second_ctrl_c_ends_at_once(long_recipe):
    process = start_cli(long_recipe, "train.per_device_train_batch_size=40", "router.selections=3000")
    wait_for(long_recipe.parent / "out" / "recipe.yaml")
    time.sleep(2)  # into the first step, which takes many seconds
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - begun < 1


def test_K7_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(stage, tmp_path, monkeypatch):
    recipe = small(stage, tmp_path, train={"per_device_eval_batch_size": 2})
    (tmp_path / "whole").mkdir()
    run(small(stage, tmp_path / "whole"))
    original = trainer.Trainer._heed_signals

    def arriving(self, n):
        if self.state.step == 2:
            self.signals.received = signal.SIGTERM
        original(self, n)

    monkeypatch.setattr(trainer.Trainer, "_heed_signals", arriving)
    with pytest.raises(Interrupted, match="after step 2;"):
        run(recipe)
    monkeypatch.setattr(trainer.Trainer, "_heed_signals", original)
    assert json.loads((tmp_path / "out/checkpoints/step-000002/state.json").read_text())["evaluation_due"]
    run(recipe, resume=True)

    def losses(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(m["step"], round(m.get("eval_loss", m.get("loss")), 6)) for m in lines]

    assert losses(tmp_path / "out") == losses(tmp_path / "whole" / "out")


def test_K11_what_a_killed_process_left_is_tidied(tmp_path):
    (tmp_path / ".tmp-best-123.old").mkdir()
    (tmp_path / ".tmp-best-123.old" / "a").write_text("old")
    (tmp_path / ".tmp-best-123").mkdir()
    (tmp_path / ".tmp-summary.json-9").write_text("{")
    (tmp_path / ".tmp-mine").write_text("not ours")
    recover(tmp_path)
    assert (tmp_path / "best" / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-mine", "best"]
    (tmp_path / ".tmp-best-124.old").mkdir()  # replaced already: the new one stays
    recover(tmp_path)
    assert (tmp_path / "best" / "a").exists()
    assert not (tmp_path / ".tmp-best-124.old").exists()


def test_K12_checkpoints_are_ordered_by_number_and_pruned_after_the_new_one(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "step-x").mkdir()
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["step-9", "step-10", "step-100"]


def test_K14_another_number_of_processes_goes_on_with_the_same_steps(stage, tmp_path, monkeypatch, capsys):
    """Begun by two, whose steps have twice the rows; the draws belong to rows, so one process does the same."""
    original = setup.load_data
    with monkeypatch.context() as begun_by_two:
        begun_by_two.setattr(setup, "load_data", lambda recipe, tokenizer, world: original(recipe, tokenizer, 2))
        begun_by_two.setattr(checkpoints.dist, "is_initialized", lambda: True)
        begun_by_two.setattr(checkpoints.dist, "get_world_size", lambda: 2)
        recipe = small(stage, tmp_path, train={"save_steps": 1})
        run(recipe)
    adapter = tmp_path / "out" / "adapter" / "adapter.safetensors"
    wanted = adapter.read_bytes()
    (tmp_path / "out" / "summary.json").unlink()
    last = checkpoints.list_checkpoints(tmp_path / "out" / "checkpoints")[-1]
    shutil.rmtree(last)
    trainer.train(recipe, Console(width=200), resume=True)
    assert "not bit-reproducible: processes was 2, is 1" in capsys.readouterr().out
    assert adapter.read_bytes() == wanted
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["origin"]["rows_per_step"] == 2 * recipe.train.per_device_train_batch_size


def test_K12_a_damaged_newer_checkpoint_never_crowds_out_a_whole_one(tmp_path):
    for step in (5, 10, 15, 20):
        (tmp_path / f"step-{step:06d}").mkdir()
    checkpoints.prune(tmp_path, 15, keep=1)  # 20 was found damaged, 15 has just been written
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["step-000015"]


def test_K7_a_deferred_evaluation_is_recorded_once(stage, tmp_path):
    """Killed after the deferred evaluation and before the next save: the record is made again, not twice."""
    from remix_cli.runs import RunFolder
    from remix_cli.train.record import Recorder

    lines = [{"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.0}, {"step": 3, "loss": 1.0}]
    for due, kept in ((True, lines[:1]), (False, lines[:2])):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        Recorder(small(stage, tmp_path), RunFolder(tmp_path), 2, due)
        assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == kept


def test_K14_other_rows_or_another_base_model_are_refused(stage, tmp_path, verb):
    model, rows, _ = stage
    mine = tmp_path / "rows.jsonl"
    mine.write_bytes(rows.read_bytes())
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(model, mine, tmp_path / "out"))
    verb("train", recipe)
    (tmp_path / "out" / "summary.json").unlink()  # as if it had been killed at the very end
    mine.write_text(rows.read_text().replace("w1", "w2"))
    assert (
        "made from other rows and other held-out rows than this run would use"
        in verb("train", recipe, "--resume", expect=5)[1]
    )


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte")])
def test_K15_out_of_memory_is_said_and_the_checkpoint_serves(stage, tmp_path, verb, monkeypatch, error):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    original = micro_batch.accumulate_batch

    def greedy(*arguments, seed, **options):
        if seed[1] == 3:
            raise error
        return original(*arguments, seed=seed, **options)

    with monkeypatch.context() as patch:
        patch.setattr(micro_batch, "accumulate_batch", greedy)
        assert "out of memory; lower train.per_device" in verb("train", recipe, expect=2)[1]
    verb("train", recipe, "--resume")


@pytest.mark.parametrize("what", ["lora_A", "router"])
def test_N2_an_infinite_gradient_stops_before_the_update(stage, tmp_path, monkeypatch, what):
    original = micro_batch.accumulate_batch
    recipe = small(stage, tmp_path)
    seen = {}

    def poisoned(model, adapter, *arguments, seed, **options):
        result = original(model, adapter, *arguments, seed=seed, **options)
        if seed[1] == 2:
            seen.update({name: p.detach().clone() for name, p in adapter.parameters().items()}, adapter=adapter)
            next(p for name, p in adapter.parameters().items() if name.endswith(what)).grad[0, 0] = float("inf")
        return result

    monkeypatch.setattr(micro_batch, "accumulate_batch", poisoned)
    with pytest.raises(DivergedError, match=r"diverged at step 3.*gradient norm inf"):
        run(recipe)
    after = seen.pop("adapter").parameters()
    assert all(torch.equal(seen[name], p) for name, p in after.items())


def test_N3_a_base_model_with_a_nan_is_refused_by_tensor(stage, tmp_path, verb):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(stage[0], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(folder, stage[1], tmp_path / "out"))
    _, err = verb("train", recipe, expect=5)
    assert "model.layers.1.mlp.up_proj.weight holds non-finite values" in err


def test_N6_what_exit_0_left_is_finite_and_whole(finished):
    checked = 0
    for path in finished.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.isfinite(tensor).all(), name
            assert tensor.dtype in (torch.float32,), name
            checked += tensor.numel()
    assert checked > 10_000
    for path in [*finished.rglob("*.json"), *finished.rglob("*.jsonl")]:
        for text in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


def test_L1_no_secret_is_written_or_printed(stage, tmp_path, verb, monkeypatch):
    secret = "hf_verysecrettoken"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, secret)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    printed = [verb("train", recipe), verb("eval", tmp_path / "out", "--task", "nll"), verb("validate", recipe)]
    printed.append(verb("train", recipe, f"data.train.0.path=https://me:{secret}@example.org/x.jsonl", expect=2))
    monkeypatch.setattr(micro_batch, "accumulate_batch", lambda *a, **k: 1 / 0)
    printed.append(verb("train", recipe, "--overwrite", expect=1))
    assert secret not in repr(printed)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_L2_a_bug_of_ours_shows_no_values(stage, tmp_path, verb, monkeypatch):
    def broken(*arguments, **options):
        password = "hunter2"
        return {}[len(password)]

    monkeypatch.setattr(micro_batch, "accumulate_batch", broken)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    _, err = verb("train", recipe, expect=1)
    assert "hunter2" not in err
    assert "unexpected KeyError" in err
    assert "--debug" in err
