"""Storage that refuses and runs that meet: rows S*, M* of docs/reliability.md."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import run, small, start_cli
from helpers.tiny import recipe_text, write_recipe

from remix_cli import storage
from remix_cli.errors import BusyError, StorageError
from remix_cli.evaluation.answers import open_lines
from remix_cli.storage import lock_folder, publish_folder
from remix_cli.train import checkpoints, setup


def test_M1_whoever_loses_a_new_folder_leaves_the_winners_lock_alone(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    with lock_folder(folder):
        monkeypatch.setattr(Path, "exists", lambda self: False)  # both saw that there was no folder yet
        with pytest.raises(BusyError, match="in use"), lock_folder(folder):
            pass
        monkeypatch.undo()
        assert (folder / ".lock").exists()


def test_S7_a_kill_while_overwriting_leaves_a_folder_of_ours(stage, tmp_path, monkeypatch):
    run(small(stage, tmp_path))
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **o: removed.append(self.name) or unlink(self, **o))
    run(small(stage, tmp_path), overwrite=True)
    names = [n for n in removed if n in ("recipe.yaml", "metrics.jsonl", "summary.json")]
    assert names[-1] == "recipe.yaml"


def test_S1_the_error_says_how_much_is_missing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_sync", full)
    wanted = r"cannot write .*out: No space left on device \(3.0 MiB needed, [\d.]+ MiB free\); make room"
    with pytest.raises(StorageError, match=wanted), publish_folder(tmp_path / "out", needed=3 * 2**20) as scratch:
        (scratch / "a").write_text("x")
    assert not list(tmp_path.iterdir())


def test_S1_a_full_disk_seen_by_a_library_in_rust_is_a_storage_error(tmp_path):
    from tokenizers import Tokenizer, models

    full = "cannot write .*out: No space left on device .os error 28."
    with pytest.raises(StorageError, match=full), publish_folder(tmp_path / "out"):
        Tokenizer(models.BPE()).save("/dev/full")


@pytest.mark.parametrize("begin", [lock_folder, lambda folder: open_lines(folder, "adapter-nll", {})])
def test_S1_what_was_told_is_not_told_again_when_the_file_is_closed(tmp_path, begin):
    """Files that may not grow: the flush is refused, and so is that of closing, which is nobody's bug."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*: File too large"), begin(tmp_path / "run"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_S1_a_really_full_disk(stage, tmp_path, verb):
    """A 200 KiB file system; skipped where mounting is not allowed."""
    small_disk = tmp_path / "disk"
    small_disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small_disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], small_disk / "out"))
        (small_disk / "ballast").write_bytes(b"x" * 120_000)
        _, err = verb("train", recipe, expect=4)
        assert "No space left on device" in err or "MiB are free" in err
        (small_disk / "ballast").unlink()
        resume = ["--resume"] if (small_disk / "out" / "recipe.yaml").exists() else []
        verb("train", recipe, "train.save_total_limit=1", *resume)
    finally:
        subprocess.run(["umount", "-l", str(small_disk)], check=False)


def test_S2_a_disk_that_is_too_small_is_refused_before_the_model_loads(stage, tmp_path, verb, monkeypatch):
    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("remix_cli.train.prepare.free_bytes", lambda _: 1000)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    _, err = verb("train", recipe, expect=4)
    assert re.search(r"needs 0\.\d MiB for 2 checkpoints and the one being written, 0\.0 MiB are free", err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["below a file", "a file", "read-only"])
def test_S3_outputs_that_cannot_be_written(stage, tmp_path, verb, monkeypatch, kind):
    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("the model was loaded"))
    place = tmp_path / "place"
    if kind == "read-only":
        place.mkdir()
        bind = [["mount", "--bind", place, place], ["mount", "-o", "remount,ro,bind", place]]
        if any(subprocess.run(list(map(str, c)), capture_output=True, check=False).returncode for c in bind):
            pytest.skip("mounting is not allowed here")
    else:
        place.write_text("x")
    output = place if kind == "a file" else place / "out"
    try:
        recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], output))
        verb("train", recipe, expect=2 if kind == "a file" else 4)
    finally:
        if kind == "read-only":
            subprocess.run(["umount", "-l", str(place)], check=False)


def test_S5_files_folder_and_parent_are_flushed_in_that_order(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, storage._rename
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(Path(os.readlink(f"/proc/self/fd/{fd}"))) or fsync(fd))
    monkeypatch.setattr(storage, "_rename", lambda *a: calls.append("rename") or rename(*a))
    with publish_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("x")
        (scratch / "b").write_text("y")
    assert calls == [scratch / "a", scratch / "b", scratch, "rename", tmp_path]


def test_S6_the_temporary_folder_is_not_used(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr("tempfile.tempdir", None)
    run(small(stage, tmp_path, train={"max_steps": 1}))
    assert checkpoints.verify(tmp_path / "out" / "checkpoints" / "step-000001") is None


def test_M1_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from remix_cli.storage import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=f"in use by process {holder.pid}"), lock_folder(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path):
        pass


@pytest.mark.slow
def test_M3_two_runs_read_the_same_table_at_once(stage, tmp_path):
    """Parquet goes through the datasets library's cache, which both processes share."""
    import datasets

    rows = tmp_path / "rows.parquet"
    pairs = [json.loads(line) for line in stage[1].read_text().splitlines()]
    datasets.Dataset.from_list(pairs).to_parquet(str(rows))
    processes = []
    for name in ("a", "b"):
        recipe = recipe_text(stage[0], rows, name, train={"max_steps": 2, "save_steps": None})
        processes.append(start_cli(write_recipe(tmp_path / f"{name}.yaml", recipe)))
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    a, b = ((tmp_path / n / "adapter" / "adapter.safetensors").read_bytes() for n in ("a", "b"))
    assert a == b
