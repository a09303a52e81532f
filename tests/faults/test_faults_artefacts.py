"""Adapters and checkpoints that are damaged, forged or somebody else's: rows A* of docs/reliability.md."""

import json
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.common import ROOT
from helpers.tiny import recipe_text, write_recipe, write_tiny_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from remix_cli.core.description import read_description
from remix_cli.core.store import CONFIG_FILE, WEIGHTS_FILE, load_stored
from remix_cli.errors import ArtefactError
from remix_cli.folders import check_run
from remix_cli.models import forward_settings, identify, load_model, load_tokenizer
from remix_cli.recipe import load_recipe
from remix_cli.recipe.schema import Model
from remix_cli.storage import seal, sha256
from remix_cli.train import checkpoints, trainer
from remix_cli.train.trainer import train


@pytest.fixture
def adapter(finished, tmp_path):
    return shutil.copytree(finished / "adapter", tmp_path / "adapter")


def sign(folder):
    """Make the description vouch for whatever the weights file holds now, as a forger would."""
    redescribe(folder, lambda described: described.update(weights_sha256=sha256(folder / WEIGHTS_FILE)))


def redescribe(folder, change, sealed=True):
    """Change the description, and its hash of itself unless it is to be the one of before."""
    described = json.loads((folder / CONFIG_FILE).read_text())
    change(described)
    if sealed:
        described.pop("sha256", None)
        described = seal(described)
    (folder / CONFIG_FILE).write_text(json.dumps(described))


def refused(folder) -> str:
    with pytest.raises(ArtefactError) as caught:
        load_stored(folder)
    (line,) = caught.value.problems
    assert str(folder) in line
    return line


def header(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


def tensor(**changes) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    text = json.dumps({"x": entry}).encode()
    return header(len(text), text) + b"\0" * 8


MALFORMED = {
    "empty": b"",
    "short": b"\x08",
    "no header": header(0, b""),
    "header longer than the file": header(1 << 20),
    "header of 2^63 bytes": header((1 << 63) - 1),
    "header of 2^64 - 1 bytes": b"\xff" * 8,
    "header not JSON": header(4, b"oops"),
    "header a list": header(2, b"[]"),
    "header not UTF-8": header(4, b'{"\xff"'),
    "header nested": header(100_000, b"[" * 100_000),
    "offsets past the end": tensor(data_offsets=[0, 800]),
    "offsets reversed": tensor(data_offsets=[8, 0]),
    "negative offset": tensor(data_offsets=[-8, 0]),
    "shape larger than the data": tensor(shape=[1 << 40]),
    "shape overflowing": tensor(shape=[1 << 32, 1 << 32]),
    "negative shape": tensor(shape=[-2]),
    "unknown dtype": tensor(dtype="F31"),
    "no dtype": header(20, b'{"x":{"shape":[2]}} '),
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "zip": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_A1_malformed_weights_are_refused(adapter, content):
    (adapter / WEIGHTS_FILE).write_bytes(content)
    assert "damaged or replaced" in refused(adapter)
    sign(adapter)
    refused(adapter)


def test_A1_3000_edited_headers_crash_nothing(adapter):
    """Each loads or is refused; memory stays bounded because no size is believed."""
    good = (adapter / WEIGHTS_FILE).read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    draw, refusals = random.Random(0), 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(8 + length)] = draw.randrange(256)
        (adapter / WEIGHTS_FILE).write_bytes(data)
        sign(adapter)
        try:
            load_stored(adapter)
        except ArtefactError:
            refusals += 1
    assert refusals > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.clear(), "not a readable adapter description"),
        (lambda d: d.update(format=99), "format 99"),
        (lambda d: d.pop("base_fingerprint"), "not a readable adapter description"),
        (lambda d: d["adapter"].update(pool_size=-1), "not a readable adapter description"),
        (lambda d: d["adapter"].update(pool_size="4"), "not a readable adapter description"),
        (lambda d: d["adapter"].update(colour=1), "not a readable adapter description"),
        (lambda d: d.update(adapter=[1]), "not a readable adapter description"),
    ],
)
def test_A1_malformed_descriptions_are_refused(adapter, change, message):
    redescribe(adapter, change)
    assert message in refused(adapter)
    (adapter / CONFIG_FILE).write_text("{")
    assert "not a readable" in refused(adapter)


WRONG = {
    "omega": "zzz",
    "level": "zzz",
    "scope": "zzz",
    "method": 3,
    "dropout": float("nan"),
    "router_init_std": -1.0,
    "router_unit_input": 1,
    "active": 2.5,
    "rank": True,
    "virtual_tokens": 0,
    "target_modules": [],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_description_whose_values_mean_nothing_is_refused_whoever_vouches_for_it(adapter, key):
    redescribe(adapter, lambda d: d["adapter"].update({key: WRONG[key]}))
    assert "not a readable adapter description" in refused(adapter)
    assert key in refused(adapter)


def test_an_adapter_of_an_unknown_method_is_refused(finished, tmp_path, verb):
    run = shutil.copytree(finished, tmp_path / "run")
    redescribe(run / "adapter", lambda d: d["adapter"].update(method="zzz"))
    assert "its method ('zzz') is none of those known: remix, mixlora" in verb("eval", run, expect=5)[1]


@pytest.mark.parametrize("change", [{"active": 3}, {"omega": "lora"}, {"level": "sequence"}], ids=str)
def test_a_description_that_was_changed_is_refused(adapter, change):
    redescribe(adapter, lambda d: d["adapter"].update(change), sealed=False)
    assert "damaged or changed" in refused(adapter)
    redescribe(adapter, lambda d: d.pop("sha256"), sealed=False)
    assert "damaged or changed" in refused(adapter)


@pytest.mark.parametrize("change", [{"pool_size": 10**9}, {"rank": 10**9}, {"pool_size": 3, "rank": 4}], ids=str)
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_built(finished, tmp_path, verb, change):
    run = shutil.copytree(finished, tmp_path / "run")
    redescribe(run / "adapter", lambda d: d["adapter"].update(change))
    assert "does not describe adapter.safetensors" in refused(run / "adapter")
    assert "does not describe" in verb("export", run, "--format", "peft-experts", "-o", tmp_path / "e", expect=5)[1]


def test_no_single_bit_of_a_description_or_manifest_may_flip(adapter, finished):
    """All of them, without reading any other file."""
    checkpoint = finished / "checkpoints" / "step-000004"
    for path, problem in (
        (adapter / CONFIG_FILE, lambda: _refusal(adapter)),
        (checkpoint / "manifest.json", lambda: checkpoints.verify(checkpoint)),
    ):
        good = path.read_bytes()
        try:
            for place in range(0, 8 * len(good), 7):
                data = bytearray(good)
                data[place // 8] ^= 1 << place % 8
                path.write_bytes(data)
                assert problem() or json.loads(data) == json.loads(good), (place, data)  # 1E-06 is 1e-06
        finally:
            path.write_bytes(good)
        assert not problem()


def _refusal(folder):
    try:
        read_description(folder)
    except ArtefactError as error:
        return str(error)


def test_folders_of_the_first_format_are_read(finished, tmp_path, verb):
    run = shutil.copytree(finished, tmp_path / "run")
    for path in (run / "adapter" / CONFIG_FILE, *run.glob("checkpoints/step-*/manifest.json")):
        values = json.loads(path.read_text())
        del values["sha256"]
        for key in ("trained_on", "base_settings", "tokenizer_probe"):
            values.pop(key, None)
        path.write_text(json.dumps(values | {"format": 2}))
        assert checkpoints.verify(path.parent) is None or path.name == CONFIG_FILE
    summary = json.loads((run / "summary.json").read_text())
    del summary["adapters"]
    (run / "summary.json").write_text(json.dumps(summary))
    load_stored(run / "adapter")
    verb("eval", run, "--task", "nll", "--limit", 4)


def test_A2_one_flipped_bit_or_another_runs_weights(adapter, finished):
    good = (adapter / WEIGHTS_FILE).read_bytes()
    for position in (9, len(good) // 2, len(good) - 1):
        data = bytearray(good)
        data[position] ^= 1
        (adapter / WEIGHTS_FILE).write_bytes(data)
        assert "damaged or replaced" in refused(adapter)
    shutil.copy(finished / "checkpoints" / "step-000002" / WEIGHTS_FILE, adapter / WEIGHTS_FILE)
    assert "damaged or replaced" in refused(adapter)


def test_A3_a_pickle_is_not_unpickled(adapter, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "sentinel"), "w"))

    torch.save(Evil(), adapter / WEIGHTS_FILE)
    sign(adapter)
    refused(adapter)
    for name in ("adapter.bin", "adapter.pt", "optimizer.pt"):
        torch.save(Evil(), adapter / name)
    (adapter / WEIGHTS_FILE).unlink()
    assert "missing" in refused(adapter)
    assert not (tmp_path / "sentinel").exists()


def test_N3_an_adapter_with_a_nan_is_refused_by_tensor(adapter):
    tensors = load_file(adapter / WEIGHTS_FILE)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, adapter / WEIGHTS_FILE)
    sign(adapter)
    assert f"tensor {name} holds non-finite values" in refused(adapter)


@pytest.fixture
def movable(finished, stage, tmp_path):
    """A copy of the finished run whose recipe names a copy of its base model, both free to be changed."""
    model = shutil.copytree(stage[0], tmp_path / "model")
    run = shutil.copytree(finished, tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(stage[0]), str(model)))
    return model, run


def test_A4_other_weights_of_the_same_shapes_are_refused_unless_allowed(movable, verb, tmp_path):
    model, run = movable
    verb("eval", run, "--task", "nll")
    shutil.rmtree(model)
    write_tiny_model(model, seed=1)
    for arguments in (("eval", run, "--task", "nll"), ("route-stats", run)):
        _, err = verb(*arguments, expect=5)
        assert "trained on another base model than" in err
        assert "--any-base" in err
        verb(*arguments, "--any-base")


def test_A4_another_tokenizer_is_refused(movable, verb):
    model, run = movable
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "trained on another tokenizer than" in verb("eval", run, "--task", "nll", expect=5)[1]


def test_A4_other_shapes_and_other_names(movable, verb):
    _, run = movable
    (run / "summary.json").unlink()  # which knows the adapter
    weights = run / "adapter" / WEIGHTS_FILE
    original = load_file(weights)
    name = next(iter(original))
    for change, message in (
        (lambda t: t.update({name: t[name][:-1].clone()}), "is (11, 24), declared (12, 'any')"),
        (lambda t: t.update({name: t[name][:, :-1].clone()}), "has another shape"),
        (lambda t: t.pop(name), "1 missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected"),
    ):
        tensors = dict(original)
        change(tensors)
        save_file(tensors, weights)
        sign(run / "adapter")
        assert message in verb("eval", run, "--task", "nll", expect=5)[1]


NORMALISER = {"type": "Replace", "pattern": {"String": "1"}, "content": "2"}
OTHER_BASE = [
    ("config.json", "rms_norm_eps", 1e-3, "base model (rms_norm_eps was 1e-06, is 0.001)"),
    ("config.json", "rope_parameters", {"rope_theta": 5e5}, "base model (rope.rope_theta was 10000.0, is 500000.0)"),
    ("config.json", "hidden_act", "gelu", "base model (hidden_act was silu, is gelu)"),
    ("tokenizer.json", "normalizer", NORMALISER, "tokenizer"),
]


@pytest.mark.parametrize(("file", "key", "value", "told"), OTHER_BASE)
def test_A4_equal_weights_and_words_that_work_otherwise_are_refused(movable, verb, file, key, value, told):
    model, run = movable
    values = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(values | {key: value}))
    assert f"trained on another {told} than" in verb("eval", run, "--task", "nll", expect=5)[1]
    verb("eval", run, "--task", "nll", "--any-base")


def test_a_base_is_the_same_in_another_precision_and_without_settings_of_other_versions(stage):
    def identity(dtype):
        model = Model(name_or_path=str(stage[0]), dtype=dtype)
        return identify(model, load_model(model, torch.device("cpu")), load_tokenizer(model))

    one, other = identity("float32"), identity("bfloat16")
    assert one.base_settings["rope.rope_theta"] == 10000
    assert not one.differences(other)
    assert not one.differences(replace(other, base_settings={"of_a_later_version": 1}))
    assert not one.differences(replace(other, base_settings=None, tokenizer_probe=None))
    assert one.differences(replace(other, base_settings={"rms_norm_eps": 1.0}))
    single = LlamaConfig(rms_norm_eps=float(torch.tensor(1e-5)))  # as GGUF files have it
    assert forward_settings(single) == forward_settings(LlamaConfig(rms_norm_eps=1e-5))


@pytest.fixture(scope="module")
def sibling(stage):
    """A run like the finished one, under another seed."""
    folder = stage[2] / "sibling"
    recipe = recipe_text(*stage[:2], folder) | {"seed": 1}
    train(load_recipe(write_recipe(stage[2] / "sibling.yaml", recipe)), Console(quiet=True))
    return folder


@pytest.mark.parametrize("which", ["adapter", "best"])
@pytest.mark.parametrize("known", ["summary", "checkpoints"])
def test_A2_the_adapter_of_another_run_of_equal_method_and_size_is_refused(
    finished, sibling, tmp_path, verb, which, known
):
    run = shutil.copytree(finished, tmp_path / "run")
    flags = ["--best"] if which == "best" else []
    if known == "summary":
        shutil.rmtree(run / "checkpoints")
    else:
        (run / "summary.json").unlink()
    verb("eval", run, "--task", "nll", "--limit", 2, *flags)
    shutil.rmtree(run / which)
    shutil.copytree(sibling / which, run / which)
    told = "not the adapter that the run ended with" if known == "summary" else "trained by another run"
    for ask in (["eval"], ["route-stats"], ["generate"], ["export", "--format", "peft-experts", "-o", tmp_path / "e"]):
        _, err = verb(ask[0], run, *ask[1:], *flags, expect=5)
        assert f"run/{which}: {told}; put the run's own back" in err


def test_A2_another_adapter_of_the_same_run_is_refused_and_resuming_puts_the_runs_own_back(finished, tmp_path, verb):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(run / "checkpoints" / "step-000002" / name, run / "adapter" / name)
    assert "not the adapter that the run ended with" in verb("eval", run, expect=5)[1]
    out, _ = verb("train", run / "recipe.yaml", f"output_dir={run}", "--resume")
    assert "taken from the last checkpoint" in " ".join(out.split())
    assert (run / "adapter" / WEIGHTS_FILE).read_bytes() == (finished / "adapter" / WEIGHTS_FILE).read_bytes()
    verb("eval", run, "--task", "nll", "--limit", 2)


def test_no_summary_stands_beside_an_adapter_that_is_being_replaced(finished, tmp_path, monkeypatch):
    """Else a kill between the two would leave a healthy run that is refused."""
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    publish, seen = trainer.publish_folder, []

    def watched(target, **options):
        seen.append((target.name, (run / "summary.json").exists()))
        return publish(target, **options)

    monkeypatch.setattr(trainer, "publish_folder", watched)
    train(load_recipe(run / "recipe.yaml", [f"output_dir={run}"]), Console(quiet=True), resume=True)
    assert seen == [("adapter", False)]
    assert check_run(run)


def test_rows_that_changed_since_the_training_are_not_taken_for_its_held_out_rows(stage, tmp_path, verb):
    """Cut anew from the changed file, the held-out rows are among those that were trained on."""
    rows = tmp_path / "rows.jsonl"
    lines = stage[1].read_text().splitlines(keepends=True)
    rows.write_text("".join(lines))
    run = tmp_path / "run"
    train(load_recipe(write_recipe(tmp_path / "r.yaml", recipe_text(stage[0], rows, run))), Console(quiet=True))
    asks = (
        ["eval", run, "--task", "nll"],
        ["eval", run, "--task", "gsm8k", "--max-new-tokens", "2"],
        ["eval", run, "--task", "nll", "--base"],
        ["route-stats", run],
        ["route-stats", run, "--headroom", "--limit", "2"],
        ["export", run, "--format", "peft-merged", "--rows", "8", "-o", tmp_path / "lora"],
    )
    rows.write_text("".join(reversed(lines)))
    for ask in asks:
        _, err = verb(*ask, expect=5)
        assert err.startswith(f"error: {rows}: changed since the training, whose held-out rows were others")
    verb(*asks[0], "--data", stage[1])
    rows.write_text("".join(lines))
    verb(*asks[0])


def test_A7_settings_that_would_import_code_are_ignored_or_refused(adapter, tmp_path):
    evil = {"auto_map": {"AutoModel": "evil.M"}, "parent_library": "evil", "megatron_core": "evil"}
    redescribe(adapter, lambda described: described.update(evil))
    load_stored(adapter)
    assert "evil" not in sys.modules


def test_A8_loading_and_saving_changes_no_byte(finished, tmp_path):
    from remix_cli.core.store import save_adapter
    from remix_cli.runs import load_run

    run = load_run(finished)
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", run.adapter, run.stored.identity, run.stored.trained_on)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (finished / "adapter" / name).read_bytes()


@pytest.mark.slow
def test_A8_bytes_do_not_depend_on_the_process(finished, stage, tmp_path):
    """Two processes with different hash seeds write the same adapter."""
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], "out", train={"max_steps": 1}))
    found = set()
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "remix_cli", "train", str(recipe), "--overwrite"],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            timeout=120,
        )
        found.add((tmp_path / "out" / "adapter" / WEIGHTS_FILE).read_bytes())
    assert len(found) == 1


def test_A9_an_export_that_fails_half_way_leaves_nothing(finished, tmp_path, monkeypatch):
    from remix_cli.export import peft_experts

    original, written = peft_experts._write_lora, []

    def failing(folder, stored, i):
        original(folder, stored, i)
        written.append(i)
        if i == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_experts, "_write_lora", failing)
    with pytest.raises(Exception, match="No space left"):
        peft_experts.export_peft_experts(finished / "adapter", tmp_path / "experts")
    assert written == [0, 1, 2]
    assert not list(tmp_path.iterdir())
