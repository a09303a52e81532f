"""The verbs, in-process on a tiny model, and the ways they refuse."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.common import ROOT
from helpers.tiny import recipe_text, write_recipe, write_rows
from safetensors.torch import load_file


def test_a_run_leaves_exactly_its_files(finished):
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    adapter = {
        "remix_config.json",
        "adapter.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    state = {
        "remix_config.json",
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    expected = {"recipe.yaml", "metrics.jsonl", "summary.json"}
    expected |= {f"adapter/{n}" for n in adapter} | {f"best/{n}" for n in adapter}
    expected |= {f"checkpoints/step-00000{s}/{n}" for s in (2, 4) for n in state}
    assert {n for n in names if not n.startswith(("eval/", "stats/"))} == expected


def test_metrics_hold_every_step(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    wanted = {"epoch", "learning_rate", "router_learning_rate", "lora_grad_norm", "router_grad_norm"}
    wanted |= {"router_entropy", "ess", "tokens_per_second", "step_seconds", "peak_memory_gib"}
    assert wanted <= lines[1].keys()


def test_eval_reports_as_json_and_writes_one_line_per_example(verb, finished):
    out, _ = verb("eval", finished, "--json")
    report = json.loads(out)
    nll, gsm = report["results"]
    assert nll["scores"]["perplexity"] == pytest.approx(2.718281828 ** nll["scores"]["loss"], rel=1e-6)
    assert gsm["count"] == 8
    lines = [json.loads(line) for line in (finished / "eval" / "adapter-gsm8k.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == list(range(8))
    assert sum(line["strict_correct"] for line in lines) / 8 == gsm["scores"]["strict"]
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert nll["scores"]["loss"] == pytest.approx(metrics[-1]["eval_loss"], rel=1e-5)
    base = json.loads(verb("eval", finished, "--json", "--base", "--task", "nll")[0])
    assert base["results"][0]["scores"]["loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-5)


def test_two_tasks_of_one_kind_keep_their_rows_apart(verb, finished, stage, tmp_path):
    import shutil

    run = shutil.copytree(finished, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    other = {"task": "nll", "source": {"path": str(stage[1]), "format": "gsm8k"}}
    recipe["eval"]["tasks"] = [{"task": "nll"}, other]
    write_recipe(run / "recipe.yaml", recipe)
    report = json.loads(verb("eval", run, "--json", "--limit", "5")[0])
    assert [(r["task"], r["count"]) for r in report["results"]] == [("nll", 5), ("nll-2", 5)]
    lines = [(run / "eval" / f"adapter-{name}.jsonl").read_text() for name in ("nll", "nll-2")]
    assert lines[0] != lines[1]


def test_tables_fit_80_columns(verb, finished):
    for arguments in (("eval", finished, "--task", "nll"), ("route-stats", finished)):
        out, _ = verb(*arguments)
        table = out.split("written:")[0]
        assert max(map(len, table.splitlines())) <= 80


def test_route_stats_counts_real_tokens(verb, finished):
    report = json.loads(verb("route-stats", finished, "--json", "--limit", "3")[0])
    assert [b["name"] for b in report["blocks"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for block in report["blocks"]:
        assert block["tokens"] == report["tokens"]
        assert sum(block["share"]) == pytest.approx(2)
        assert block["ess_weights"] == pytest.approx(2, rel=1e-5)


def test_K3_a_finished_run_resumes_to_nothing(verb, finished, stage):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    out, _ = verb("train", stage[2] / "recipe.yaml", "--resume")
    assert "already complete" in out
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_the_folder_of_a_run_is_not_overwritten(verb, finished, stage):
    _, err = verb("train", stage[2] / "recipe.yaml", expect=2)
    assert "--resume" in err
    assert "--overwrite" in err


def test_export_gives_peft_folders_that_equal_the_pool_with_all_active(verb, finished, stage, tmp_path):
    """With k = n every LoRA is active, and PEFT with all n adapters active must give our logits."""
    peft = pytest.importorskip("peft")
    from dataclasses import replace

    from remix_cli.core.trace import Weighting
    from remix_cli.models import load_model
    from remix_cli.recipe.schema import Model
    from remix_cli.runs import load_run

    target = tmp_path / "experts"
    verb("export", finished, "--format", "peft-experts", "--output", target)
    assert {p.name for p in target.iterdir()} == {
        "README.md",
        "router.safetensors",
        *[f"lora-{i}" for i in range(4)],
    }
    ids = torch.randint(4, 50, (2, 9))
    run = load_run(finished)
    for router in run.adapter.routers.values():
        router.config = replace(router.config, active=4, omega="rslora")
    scale = run.stored.config.scale  # weights of the trained k, not of k = n
    for router in run.adapter.routers.values():
        router.forward = lambda x: Weighting(torch.full((*x.shape[:-1], 4 * 3), scale), None)
    ours = run.model(ids).logits
    base = load_model(Model(name_or_path=str(stage[0]), dtype="float32"), torch.device("cpu"))
    wrapped = peft.PeftModel.from_pretrained(base, target / "lora-0", adapter_name="lora-0")
    for i in range(1, 4):
        wrapped.load_adapter(target / f"lora-{i}", adapter_name=f"lora-{i}")
    wrapped.base_model.set_adapter([f"lora-{i}" for i in range(4)])
    assert torch.allclose(wrapped.eval()(ids).logits, ours, atol=1e-6, rtol=1e-5)
    assert load_file(target / "router.safetensors").keys() == {f"model.layers.{i}.mlp.router" for i in (0, 1)}
    _, err = verb("export", finished, "-o", target, expect=2)
    assert "exists" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["adapter.pool_sise=3"], "did you mean adapter.pool_size?"),
        (["adapter.active=9"], "adapter.active"),
        (["router.selections=1"], "router.selections"),
        (["adapter.target_modules=[gate_proj, up_prj]"], "'up_prj'; this model has: q_proj, k_proj"),
        (["data.train.0.path=missing.jsonl"], "data.train.0.path: missing.jsonl: no such file"),
        (["data.train.0.format=arc"], "row 1: no column 'question'|row 1: no column"),
        (["model.name_or_path=./nowhere"], "model.name_or_path: ./nowhere: no such folder"),
        (["data.max_length=9999"], "data.max_length"),
        (["data.use_chat_template=yes"], "use_chat_template"),
        (["train.report_to=wandb"], "train.report_to"),
    ],
)
def test_bad_recipes_exit_2_before_anything_is_written(verb, stage, tmp_path, change, message):
    model, rows, _ = stage
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(model, rows, tmp_path / "out"))
    _, err = verb("train", recipe, *change, expect=2)
    assert re.search(message.replace("?", r"\?"), err), err
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_D8_rows_that_lose_every_supervised_token_are_refused(verb, stage, tmp_path):
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"question": "w1 " * 20, "answer": "w2"}) + "\n")
    recipe = recipe_text(stage[0], rows, tmp_path / "out", data={"max_length": 16, "validation_fraction": 0.0})
    del recipe["train"]["eval_steps"]
    _, err = verb("train", write_recipe(tmp_path / "r.yaml", recipe), expect=2)
    assert "no row has a supervised token within data.max_length = 16" in err


def test_validate_shows_the_masked_row_and_the_counts(verb, stage, tmp_path):
    model, rows, _ = stage
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(model, rows, tmp_path / "out"))
    out, _ = verb("validate", recipe)
    assert re.search(r"<bot>\s*«w\d+ w\d+ #### \d ?<eos>»", out), out
    found = json.loads(verb("validate", recipe, "--json")[0])
    d, f, n, r, layers = 16, 24, 4, 3, 2
    counts = found["parameters"]
    assert counts["lora_a"] == layers * n * r * (d + d + f)
    assert counts["lora_b"] == layers * n * r * (f + f + d)
    assert counts["router"] == layers * n * d
    assert counts["active"] == (counts["lora_a"] + counts["lora_b"]) // 2 + counts["router"]
    assert not (tmp_path / "out").exists()
    assert verb("validate", recipe, "router.estimator=straight_through")[0].count("BIASED") == 1


def test_runs_that_are_none_are_refused(verb, tmp_path, finished):
    assert "not a run folder" in verb("eval", tmp_path, expect=5)[1]
    assert "not a run folder" in verb("route-stats", tmp_path / "nothing", expect=5)[1]
    assert "not a run folder" in verb("export", tmp_path, "-o", tmp_path / "x", expect=5)[1]
    assert "--task" in verb("eval", finished, "--task", "gsm9k", expect=2)[1]
    assert "no such file" in verb("eval", finished, "--data", "nothing.jsonl", expect=2)[1]


def test_schema_is_json_and_names_every_group(verb):
    printed = json.loads(verb("schema")[0])
    assert {"model", "adapter", "router", "data", "train", "eval", "alarm", "output_dir", "seed"} == printed[
        "properties"
    ].keys()


def test_tasks_are_scored_during_training_and_choose_the_best(verb, stage, tmp_path):
    """The task's rows are the held-out ones and more, so its losses are those of `remix eval` on them."""
    source = {"path": str(stage[1]), "format": "gsm8k"}
    recipe = recipe_text(
        *stage[:2],
        tmp_path / "out",
        eval={"tasks": [{"task": "nll", "source": source}, {"task": "gsm8k", "max_new_tokens": 4}]},
        train={"eval_tasks_limit": 5, "metric_for_best_model": "nll/perplexity"},
    )
    path = write_recipe(tmp_path / "r.yaml", recipe)
    verb("train", path)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    held = [m for m in metrics if "eval_loss" in m]
    assert all({"nll/loss", "nll/perplexity", "gsm8k/strict", "gsm8k/flexible"} <= m.keys() for m in held)
    costs = [m["nll/perplexity"] for m in held]
    assert [m["best"] for m in held] == [c < min([*costs[:i], float("inf")]) for i, c in enumerate(costs)]
    report = json.loads(verb("eval", tmp_path / "out", "--task", "nll", "--limit", 5, "--json")[0])
    assert report["results"][0]["scores"]["loss"] == pytest.approx(held[-1]["nll/loss"], rel=1e-5)
    for override, message in (
        ("train.metric_for_best_model=gsm8k/loose", "use eval_loss, nll/loss"),
        ("train.metric_for_best_model=nll-2/loss", "use eval_loss, nll/loss"),
        ("train.eval_tasks_limit=null", "set train.eval_tasks_limit"),
    ):
        err = verb("validate", path, override, expect=2)[1]
        assert message in err
        assert "got" not in err


@pytest.mark.parametrize("rank", ["1", "abc", ""])
def test_a_rank_without_a_launch_hides_nothing(verb, monkeypatch, rank):
    """Schedulers and notebooks leave RANK about; only the other processes of a launch keep quiet."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    _, err = verb("train", "absent.yaml", expect=2)
    assert err == "error: absent.yaml: no such recipe file\n"


@pytest.mark.parametrize("ignored", [False, True])
def test_K8_ctrl_c_while_modules_are_imported_ends_quietly(ignored):
    """Sent as soon as the first module beyond the standard library is looked for."""
    code = (
        "import os, runpy, signal, sys\n"
        "class Look:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        f"if {ignored}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.meta_path.insert(0, Look())\n"
        "sys.argv = ['remix', '--help']\n"
        "runpy.run_module('remix_cli', run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0 if ignored else 130, "")


def test_a_run_is_resumed_from_any_folder(verb, stage, tmp_path, monkeypatch):
    """Its relative paths count from where it was begun, or from where its project was moved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    rows = write_rows(tmp_path / "a" / "rows.jsonl", 20)
    recipe = recipe_text(stage[0], "rows.jsonl", "runs/x", train={"eval_steps": None})
    monkeypatch.chdir(rows.parent)
    verb("train", write_recipe(tmp_path / "a" / "r.yaml", recipe))
    for project in ("a", "b"):
        if project == "b":
            (tmp_path / "a").rename(tmp_path / "b")
        monkeypatch.chdir(tmp_path)
        run = tmp_path / project / "runs" / "x"
        (run / "summary.json").unlink()
        out, _ = verb("train", f"{project}/runs/x/recipe.yaml", "--resume")
        assert f"paths count from {tmp_path / project}, where the run was begun" in " ".join(out.split())
        assert (run / "summary.json").is_file()
        assert not (tmp_path / "runs").exists()


def test_an_old_run_may_hold_keys_that_are_refused_now(verb, finished, stage, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    old = yaml.safe_load((run / "recipe.yaml").read_text())
    old["router"] |= {"balance": 0.5}
    old["train"] |= {"lr_scheduler_type": "constant", "warmup_ratio": 0.2}
    write_recipe(run / "recipe.yaml", old)
    verb("eval", run, "--task", "nll", "--limit", 4)
    verb("route-stats", run, "--limit", 4)
    verb("export", run, "--output", tmp_path / "experts", "--format", "peft-experts")
    verb("train", run / "recipe.yaml", f"output_dir={tmp_path / 'new'}", expect=2)
    write_recipe(run / "recipe.yaml", old | {"output_dir": str(run)})
    assert "already complete; nothing to do" in " ".join(verb("train", run / "recipe.yaml", "--resume")[0].split())
    assert "train.warmup_ratio" in verb("train", run / "recipe.yaml", "train.warmup_ratio=0.2", "--resume", expect=2)[1]


@pytest.mark.parametrize(("flag", "kind"), [("--html", "folder"), ("--trace", "folder"), ("--plot", "file")])
def test_a_folder_is_no_file_and_the_reverse(verb, finished, tmp_path, flag, kind):
    place = tmp_path / "there"
    place.mkdir() if kind == "folder" else place.write_text("mine")
    _, err = verb("route-stats", finished, flag, place, expect=2)
    assert f"{flag}: {place} is a {kind}; name a" in err
    assert place.is_dir() or place.read_text() == "mine"
