"""Stopping and going on: the same bits as a run that was never stopped."""

import hashlib
import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers.runs import TRAIN, launch, outcome, recipe_for, run
from helpers.tiny import recipe_text, write_recipe, write_rows, write_tiny_model
from rich.console import Console
from safetensors.torch import load_file

from remix_cli.core.step import MicroResult
from remix_cli.core.store import BaseIdentity
from remix_cli.errors import ArtefactError, BusyError, DataError, DivergedError, Interrupted, RecipeError
from remix_cli.folders import check_run
from remix_cli.recipe import Recipe, load_recipe
from remix_cli.storage import lock_folder
from remix_cli.train import checkpoints, micro_batch, resume, trainer


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    return write_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl", 24), folder


@pytest.fixture(scope="module")
def whole(stage):
    folder = stage[2] / "whole"
    run(recipe_for(stage, folder))
    return outcome(folder)


def stop_after(monkeypatch, step):
    """As if SIGTERM had arrived during `step`."""
    original = trainer.Trainer._step

    def stopping(self, index):
        if index + 1 == step:
            self.signals.received = signal.SIGTERM
        return original(self, index)

    monkeypatch.setattr(trainer.Trainer, "_step", stopping)


def interrupted_run(stage, folder, monkeypatch, *stops):
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(Interrupted) as ended:
                run(recipe_for(stage, folder), resume=folder.exists())
            assert ended.value.exit_code == 143
            assert "--resume" in str(ended.value)
    run(recipe_for(stage, folder), resume=True)
    return outcome(folder)


@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (5,), (1, 2, 4)], ids=str)
def test_K3_K4_K6_a_stopped_run_ends_with_the_same_bits(stage, whole, monkeypatch, tmp_path, stops):
    assert interrupted_run(stage, tmp_path / "run", monkeypatch, *stops) == whole


def test_a_complete_run_is_tidied_when_it_is_resumed(stage, tmp_path):
    """A disk that refuses to remove the last scratch leaves it to nobody else."""
    recipe = recipe_for(stage, tmp_path / "run", train={"max_steps": 1})
    run(recipe)
    left = [tmp_path / "run" / ".tmp-adapter-1", tmp_path / "run" / "checkpoints" / ".tmp-step-000001-2"]
    for scratch in left:
        scratch.mkdir(parents=True)
    run(recipe, resume=True)
    assert not any(scratch.exists() for scratch in left)


@pytest.mark.parametrize("broken", ["optimizer", "coefficient", "seed"])
def test_K5_the_comparison_sees_a_resume_that_forgets_something(stage, whole, monkeypatch, tmp_path, broken):
    """Negative controls: without optimizer state, without the coefficient, with other draws."""
    original = checkpoints.restore

    def forgetful(*arguments):
        state, different = original(*arguments)
        if broken == "optimizer":
            arguments[2].state.clear()
        if broken == "coefficient":
            state.coefficient = {}
        return state, different

    monkeypatch.setattr(checkpoints, "restore", forgetful)
    if broken == "seed":
        accumulate = micro_batch.accumulate_batch
        other = lambda *a, seed, **k: accumulate(*a, seed=(seed[0], seed[1] + 1000 * (seed[1] >= 3)), **k)  # noqa: E731
        monkeypatch.setattr(micro_batch, "accumulate_batch", other)
    assert interrupted_run(stage, tmp_path / "run", monkeypatch, 3) != whole


def half_done(stage, folder, monkeypatch, stop=4):
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Interrupted):
            run(recipe_for(stage, folder))
    return folder


def test_a_damaged_checkpoint_is_skipped_by_name_and_the_one_before_serves(stage, whole, monkeypatch, tmp_path, capsys):
    folder = half_done(stage, tmp_path / "run", monkeypatch)
    file = folder / "checkpoints" / "step-000004" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    trainer.train(recipe_for(stage, folder), Console(width=200), resume=True)
    assert "step-000004: optimizer.safetensors is damaged" in capsys.readouterr().out
    assert outcome(folder) == whole


@pytest.mark.parametrize("damage", ["a renamed key", "an origin of another run", "another step's folder"])
def test_a_manifest_that_was_changed_is_skipped_and_the_checkpoint_before_serves(
    stage, whole, monkeypatch, tmp_path, capsys, damage
):
    folder = half_done(stage, tmp_path / "run", monkeypatch)
    newest = folder / "checkpoints" / "step-000004"
    manifest = newest / "manifest.json"
    if damage == "another step's folder":
        newest.rename(folder / "checkpoints" / "step-000006")
    elif damage == "a renamed key":
        manifest.write_text(manifest.read_text().replace('"origin"', '"oriqin"'))
    else:
        data = manifest.read_text()
        at = data.index('"data": "') + len('"data": "')
        manifest.write_text(data[:at] + ("1" if data[at] == "0" else "0") + data[at + 1 :])
    (folder / "checkpoints" / "step-²").mkdir()
    trainer.train(recipe_for(stage, folder), Console(width=200), resume=True)
    assert "skipped a damaged checkpoint" in capsys.readouterr().out
    (folder / "checkpoints" / "step-²").rmdir()  # no checkpoint of ours, so left alone
    assert outcome(folder) == whole


def test_K10_no_valid_checkpoint_is_refused_not_started_afresh(stage, monkeypatch, tmp_path):
    folder = half_done(stage, tmp_path / "run", monkeypatch)
    for checkpoint in checkpoints.list_checkpoints(folder / "checkpoints"):
        (checkpoint / "manifest.json").write_text("{")
    with pytest.raises(ArtefactError, match="no valid checkpoint"):
        run(recipe_for(stage, folder), resume=True)


@pytest.mark.parametrize("left", ["an empty folder", "no folder", "no metrics but an adapter"])
def test_checkpoints_that_vanished_are_told_and_nothing_starts_afresh(stage, monkeypatch, tmp_path, left):
    folder = half_done(stage, tmp_path / "run", monkeypatch)
    shutil.rmtree(folder / "checkpoints")
    if left == "an empty folder":
        (folder / "checkpoints").mkdir()
    if left == "no metrics but an adapter":
        (folder / "metrics.jsonl").unlink()
        shutil.copytree(folder / "best", folder / "adapter")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ArtefactError, match="checkpoints: holds no checkpoint, although step 2 was saved"):
        run(recipe_for(stage, folder), resume=True)
    assert sorted(folder.rglob("*")) == before


def test_a_run_that_ended_before_its_first_checkpoint_says_that_it_starts_again(
    stage, whole, monkeypatch, tmp_path, capsys
):
    folder = tmp_path / "run"
    save = trainer.Trainer._save

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_save", interrupted)  # step 2 is recorded
    with pytest.raises(KeyboardInterrupt):
        run(recipe_for(stage, folder))
    monkeypatch.setattr(trainer.Trainer, "_save", save)
    trainer.train(recipe_for(stage, folder), Console(width=200), resume=True)
    assert "no checkpoint was saved before the interruption: the run starts from step 0" in capsys.readouterr().out
    assert outcome(folder) == whole


@pytest.mark.parametrize("damage", ["not UTF-8", "a folder", "a line"])
def test_metrics_that_cannot_be_read_are_told_by_name(stage, monkeypatch, tmp_path, damage):
    folder = half_done(stage, tmp_path / "run", monkeypatch)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.unlink()
    if damage == "a folder":
        metrics.mkdir()
    else:
        metrics.write_bytes(lines[0] + (b"\xff\n" if damage == "not UTF-8" else lines[1][:9] + b"\n") + lines[2])
    with pytest.raises(ArtefactError, match=r"metrics.jsonl.*move (it|the file) away"):
        run(recipe_for(stage, folder), resume=True)


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_complete_run_without_its_adapter_is_not_called_complete(stage, whole, monkeypatch, tmp_path, damage, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stage[2] / "whole", folder)
    weights = folder / "adapter" / "adapter.safetensors"
    if damage == "gone":
        shutil.rmtree(folder / "adapter")
    else:
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    trainer.train(recipe_for(stage, folder), Console(), resume=True)
    assert "; taken from the last checkpoint" in " ".join(capsys.readouterr().out.split())
    assert outcome(folder) == whole


def test_other_held_out_rows_are_refused_when_a_run_is_resumed(stage, monkeypatch, tmp_path):
    """Its best adapter would be chosen by losses that do not compare."""
    held = write_rows(tmp_path / "held.jsonl", 9, seed=3)
    values = recipe_text(stage[0], stage[1], tmp_path / "run")
    del values["data"]["validation_fraction"]
    values["data"] |= {"validation": [{"path": str(held), "format": "gsm8k"}], "allow_overlap": True}
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(recipe)
    write_rows(held, 9, seed=4)
    with pytest.raises(ArtefactError, match="made from other held-out rows than this run would use"):
        run(recipe, resume=True)


def test_A4_a_base_model_of_other_settings_is_refused_when_a_run_is_resumed(stage, monkeypatch, tmp_path):
    stage = (shutil.copytree(stage[0], tmp_path / "model"), *stage[1:])
    folder = half_done(stage, tmp_path / "run", monkeypatch)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ArtefactError, match=r"another base model \(rms_norm_eps was 1e-06, is 0.001\) than this run"):
        run(recipe_for(stage, folder), resume=True)


def test_the_tasks_that_choose_the_best_adapter_stay(stage, tmp_path):
    """A score on other rows does not compare with the best so far; tasks that choose nothing may change."""
    source = {"path": str(stage[1]), "format": "gsm8k"}
    tasks = [[{"task": "nll", "source": source, "limit": n}] for n in (3, 4)]
    chosen = {"eval_tasks_limit": 5, "metric_for_best_model": "nll/loss"}
    for train, refused in ((TRAIN | chosen, True), (TRAIN | {"eval_tasks_limit": 5}, False)):
        old, new = (recipe_for(stage, tmp_path / "run", train=train, eval={"tasks": t}) for t in tasks)
        folder = resume.RunFolder(tmp_path / "run")
        with pytest.raises(RecipeError, match=r"eval.tasks \(nll\): .*4.*, but .*3") if refused else nullcontext():
            resume.check_same_recipe(new, old, folder)


def test_a_run_that_an_earlier_version_began_says_so(stage, monkeypatch, tmp_path):
    """Its recipe hash covers other keys, and its manifest neither held-out rows nor a hash of itself."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run(recipe_for(stage, tmp_path / "run"))
    file = tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"], manifest["origin"]["held_out"]
    file.write_text(json.dumps(manifest | {"format": checkpoints.UNSEALED}))
    whole = shutil.copytree(tmp_path / "run", tmp_path / "same")
    run(recipe_for(stage, whole), resume=True)  # nothing differs but the format
    manifest["origin"]["recipe"] = "0" * 64
    file.write_text(json.dumps(manifest | {"format": checkpoints.UNSEALED}))
    with pytest.raises(ArtefactError, match="begun under an earlier version of remix"):
        run(recipe_for(stage, tmp_path / "run"), resume=True)


def test_parts_of_a_run_on_another_disk(stage, whole, monkeypatch, tmp_path):
    """A link in a run folder leads on; it gives way like a folder, and what it leads to is left alone."""
    folder, disk = tmp_path / "run", tmp_path / "disk"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(recipe_for(stage, folder))
    disk.mkdir()
    for part in ("best", "checkpoints/step-000002"):
        place = shutil.move(folder / part, disk / Path(part).name)
        (folder / part).symlink_to(place)
    run(recipe_for(stage, folder), resume=True)
    assert outcome(folder) == whole
    assert not list(folder.rglob(".tmp-*"))
    shutil.move(folder / "checkpoints", disk / "checkpoints")
    (folder / "checkpoints").symlink_to(disk / "checkpoints")
    run(recipe_for(stage, folder), overwrite=True)
    assert outcome(folder) == whole
    assert sorted(path.name for path in disk.iterdir()) == ["best", "checkpoints", "step-000002"]


def test_an_output_that_is_a_link_to_nowhere(stage, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "unmounted" / "run")
    with pytest.raises(RecipeError, match="a link that leads nowhere"):
        run(recipe_for(stage, tmp_path / "run"))


def test_a_resumed_run_keeps_its_recipe(stage, monkeypatch, tmp_path):
    folder = half_done(stage, tmp_path / "run", monkeypatch)
    changed = recipe_for(stage, folder).model_copy(update={"seed": 5})
    with pytest.raises(RecipeError, match=r"seed: 5, but .* was begun with 0"):
        run(changed, resume=True)


def test_M1_a_folder_in_use_is_refused_with_its_process(stage, tmp_path):
    folder = tmp_path / "run"
    with lock_folder(folder), pytest.raises(BusyError, match=f"in use by process {os.getpid()}"):
        run(recipe_for(stage, folder))


def test_S7_other_files_in_the_folder_are_left_alone(stage, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"holds other files \(thesis.txt\)"):
        run(recipe_for(stage, folder), overwrite=True)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_S7_overwriting_spares_the_old_run_until_the_new_one_can_start(stage, monkeypatch, tmp_path):
    folder = half_done(stage, tmp_path / "run", monkeypatch)
    before = sorted(p.name for p in folder.rglob("*"))
    broken = recipe_for(stage, folder)
    source = broken.data.train[0].model_copy(update={"format": "arc"})
    broken = broken.model_copy(update={"data": broken.data.model_copy(update={"train": [source]})})
    with pytest.raises(DataError):
        run(broken, overwrite=True)
    assert sorted(p.name for p in folder.rglob("*")) == before
    run(recipe_for(stage, folder), overwrite=True)
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_S7_folders_named_like_ours_without_a_recipe_are_not_ours(stage, tmp_path, overwrite):
    (tmp_path / "run" / "eval").mkdir(parents=True)
    (tmp_path / "run" / "eval" / "mine.txt").write_text("x")
    with pytest.raises(RecipeError, match=r"holds other files \(eval\)"):
        run(recipe_for(stage, tmp_path / "run"), overwrite=overwrite)
    assert (tmp_path / "run" / "eval" / "mine.txt").exists()


def test_N1_divergence_stops_before_the_update(stage, monkeypatch, tmp_path):
    """N1: a NaN loss at step 3."""
    original, steps = micro_batch.accumulate_batch, []

    def poisoned(*args, seed, **options):
        result: MicroResult = original(*args, seed=seed, **options)
        steps.append(seed[1])
        if seed[1] == 2:
            result.loss = result.loss * float("nan")
        return result

    monkeypatch.setattr(micro_batch, "accumulate_batch", poisoned)
    folder = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"diverged at step 3: loss nan.*training rows.*step-000002"):
        run(recipe_for(stage, folder))
    assert max(steps) == 2
    assert [c.name for c in checkpoints.list_checkpoints(folder / "checkpoints")] == ["step-000002"]
    assert checkpoints.verify(folder / "checkpoints" / "step-000002") is None


def test_A8_equal_runs_give_equal_bytes(stage, whole, tmp_path):
    run(recipe_for(stage, tmp_path / "again"))
    assert outcome(tmp_path / "again") == whole


SLOW = [("control_variate", True), ("paper", False), ("rtg", False), ("straight_through", False)]
OTHERS = [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]  # gradients of shards: test_scaling.py


@pytest.mark.parametrize(("estimator", "sharded"), [("control_variate", False), *OTHERS])
def test_two_processes_train_what_one_trains(stage, tmp_path, estimator, sharded):
    """The same global batch, once accumulated by one process and once shared by two; an odd tail included."""
    tasks = [
        {"task": "nll", "source": {"path": str(stage[1]), "format": "gsm8k"}},
        {"task": "gsm8k", "max_new_tokens": 4},
    ]
    slowly = {"estimator": estimator, "learning_rate": 0.003}  # so that rounding flips no selection
    router = {"router": slowly, "adapter": {"dropout": 0.0}, "eval": {"tasks": tasks}}
    router["train"] = {"eval_tasks_limit": None if sharded else 3}
    one = recipe_for(stage, tmp_path / "one", **router)
    one = one.model_copy(update={"train": one.train.model_copy(update={"gradient_accumulation_steps": 4})})
    run(one)
    recipe_for(stage, tmp_path / "two", **router)
    more = ["train.gradient_accumulation_steps=2", f"train.shard_base={str(sharded).lower()}"]
    printed = launch(more, tmp_path / "two.yaml", 2)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    assert printed.count("done:") == 1
    a = load_file(tmp_path / "one" / "adapter" / "adapter.safetensors")
    b = load_file(tmp_path / "two" / "adapter" / "adapter.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        # Adam moves an entry whose gradient is next to nothing by a whole step, to whichever side rounding decides;
        # a gradient that was lost or counted twice shows in the norms below.
        assert (b[name] - a[name]).norm() < 0.25 * a[name].norm(), name
    one_metrics, two_metrics = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")
    )
    for x, y in zip(one_metrics, two_metrics, strict=True):
        assert x.keys() == y.keys()
        same = {"loss", "eval_loss", "lora_grad_norm", "router_grad_norm", "router_entropy", "ess_weights"}
        same |= {"ess_weights_worst", "largest_share", "nll/loss", "gsm8k/flexible"}
        assert sharded or "eval_loss" not in x or {"nll/loss", "gsm8k/flexible"} <= x.keys()
        for key in same & x.keys():
            assert x[key] == pytest.approx(y[key], rel=1e-3)


@pytest.mark.parametrize("other", ["seed", "rows", "settings"])
def test_processes_that_were_started_differently_are_refused(stage, monkeypatch, tmp_path, other):
    """Gradients of other models, rows or draws would be summed in silence."""
    recipe = recipe_for(stage, tmp_path / "run")
    origin = checkpoints.Origin("recipe", "data", "base", "tokenizer", 4, "held out")
    base = BaseIdentity("model", "float32", "base", "tokenizer", {"rms_norm_eps": 1e-6}, "probe")
    theirs = {
        "seed": {"recipe": recipe.model_copy(update={"seed": 9}).model_dump_json()},
        "rows": {"data": "other"},
        "settings": {"settings": {"rms_norm_eps": 1e-3}},
    }[other]
    monkeypatch.setattr(resume, "gather_object", lambda mine: [*mine, *mine])
    resume.check_ranks(recipe, origin, base, 2)
    monkeypatch.setattr(resume, "gather_object", lambda mine: [*mine, mine[0] | theirs])
    said = {"seed": "another recipe", "rows": "other rows", "settings": "other settings of the base model"}[other]
    with pytest.raises(RecipeError, match=f"rank 1 was started with {said} than rank 0"):
        resume.check_ranks(recipe, origin, base, 2)


def test_K14_a_moved_run_resumes(stage, whole, monkeypatch, tmp_path):
    folder = half_done(stage, tmp_path / "here", monkeypatch)
    shutil.move(folder, tmp_path / "there")
    run(recipe_for(stage, tmp_path / "there"), resume=True)
    assert outcome(tmp_path / "there") == whole


def test_K14_a_run_whose_model_and_rows_lie_elsewhere_now_resumes(stage, whole, monkeypatch, tmp_path):
    """Paths may change where what they hold does not."""
    folder = half_done(stage, tmp_path / "run", monkeypatch)
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(stage[0], model)
    shutil.copy(stage[1], rows)
    moved = recipe_for((model, rows, None), folder)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            run(moved, resume=True)
    run(moved, resume=True)  # from now on the run's own recipe says so, too
    assert outcome(folder) == whole
    assert str(rows) in (folder / "recipe.yaml").read_text()
    check_run(folder, best=True)
    other = write_rows(tmp_path / "other.jsonl", 24, seed=7)
    with pytest.raises(ArtefactError, match="made from other rows and other held-out rows"):
        run(recipe_for((model, other, None), half_done(stage, tmp_path / "two", monkeypatch)), resume=True)


@pytest.mark.parametrize(
    ("level", "digest"),
    [("token", "7be1ff2861b08ce0"), ("sequence", "b003c565c31e6cb7")],
)
def test_a_recipe_is_what_it_was_to_runs_that_knew_fewer_keys(level, digest):
    """As checkpoints of November 2026 hold it. A new key that fails here belongs in resume.LATER."""
    recipe = recipe_text(Path("model"), Path("rows.jsonl"), Path("out"), router={"level": level})
    text = json.dumps(resume._binding(Recipe.model_validate(recipe)), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest
    if level == "sequence":
        recipe["router"]["clusters"] = 3
        assert resume._binding(Recipe.model_validate(recipe))["router.clusters"] == 3


def test_a_checkpoint_of_another_recipe_than_the_run_now_says_is_not_blamed_on_the_user_alone(
    stage, monkeypatch, tmp_path
):
    """The recipes agree, the checkpoint's hash does not: an earlier version, or a recipe.yaml that was edited."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run(recipe_for(stage, tmp_path / "run"))
    monkeypatch.setattr(resume, "LATER", {"seed": 0})
    with pytest.raises(ArtefactError, match=r"an earlier version of remix.*or the run's recipe.yaml was changed"):
        run(recipe_for(stage, tmp_path / "run"), resume=True)
