"""Run folders: found again from anywhere, and refused at once and by name when they are absent or damaged."""

import json
import os
import shutil

import pytest
import yaml
from helpers.common import HEAVY, alone
from helpers.tiny import recipe_text, write_recipe
from rich.console import Console

from remix_cli.errors import ArtefactError
from remix_cli.folders import RUN_FROM, RunFolder, check_run
from remix_cli.recipe import load_recipe
from remix_cli.train.trainer import train


@pytest.fixture(scope="module")
def project(stage, tmp_path_factory):
    """A folder with model, rows and a finished run, whose recipe names everything relative to that folder."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(stage[0], folder / "models" / "tiny")
    shutil.copy(stage[1], folder / "rows.jsonl")
    tasks = {"tasks": [{"task": "nll", "source": {"path": "rows.jsonl", "format": "gsm8k"}}]}
    recipe = recipe_text("models/tiny", "rows.jsonl", "runs/x", train={"max_steps": 2}, eval=tasks)
    write_recipe(folder / "r.yaml", recipe)
    before = os.getcwd()
    os.chdir(folder)
    try:
        train(load_recipe(folder / "r.yaml"), Console(quiet=True))
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize("case", ["from elsewhere", "run moved", "project moved", "older run, from elsewhere"])
def test_a_run_finds_its_model_and_rows_from_anywhere(project, tmp_path, verb, monkeypatch, case):
    run = (
        shutil.copytree(project / "runs" / "x", tmp_path / "moved" / "y") if case == "run moved" else project / "runs/x"
    )
    if case == "project moved":
        run = shutil.copytree(project, tmp_path / "new") / "runs" / "x"
        recipe = run / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(project), str(tmp_path / "gone")))
    if case == "older run, from elsewhere":
        run = shutil.copytree(project, tmp_path / "old") / "runs" / "x"
        first, _, rest = (run / "recipe.yaml").read_text().partition("\n")
        assert first == f"{RUN_FROM}{json.dumps(str(project))}"
        (run / "recipe.yaml").write_text(rest)
    monkeypatch.chdir(tmp_path)
    verb("eval", run)
    verb("route-stats", run, "--limit", 4)
    verb("generate", os.path.relpath(run), "w1 w2 w7 ?", "--max-new-tokens", 2)
    found = RunFolder(run).load_recipe()
    home = {"project moved": tmp_path / "new", "older run, from elsewhere": tmp_path / "old"}.get(case, project)
    assert found.model.name_or_path == str(home / "models" / "tiny")
    assert found.data.train[0].path == found.eval.tasks[0].source.path == str(home / "rows.jsonl")


def test_where_a_run_was_begun_its_recipe_is_as_it_was_written(project, monkeypatch):
    monkeypatch.chdir(project)
    assert RunFolder(project / "runs" / "x").load_recipe() == load_recipe(project / "r.yaml")
    assert load_recipe(project / "runs" / "x" / "recipe.yaml") == load_recipe(project / "r.yaml")


def test_the_rows_of_the_run_go_before_others_of_the_same_name(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    assert RunFolder(project / "runs" / "x").load_recipe().data.train[0].path == str(project / "rows.jsonl")


@pytest.mark.parametrize(
    "ask",
    [
        ["eval"],
        ["generate", "x"],
        ["route-stats"],
        ["route-stats", "--history"],
        ["export", "-o", "out"],
        ["compare"],
        ["compare", "also-absent"],
    ],
    ids=" ".join,
)
def test_a_run_that_is_not_there_is_refused_without_loading_torch(tmp_path, monkeypatch, ask):
    """Nor anything else that takes a noticeable while: so it takes a quarter of a second on an idle machine."""
    monkeypatch.chdir(tmp_path)
    asked = [ask[0], "absent", *ask[1:]]
    code = (
        f"import sys; sys.argv = ['remix', *{asked}]\n"
        "from remix_cli.cli import main\n"
        "try: main()\n"
        f"except SystemExit as e: print(e.code, *(sys.modules.keys() & {HEAVY}))\n"
    )
    done = alone(code)
    assert done.stdout.split() == ["5"], done.stderr
    assert done.stderr.startswith("error: absent: ")
    assert not list(tmp_path.iterdir())


def test_a_forged_size_is_refused_without_loading_torch(project, tmp_path):
    """A pool of 10^9 ends before anything that takes seconds or half a gigabyte."""
    run = shutil.copytree(project / "runs" / "x", tmp_path / "run")
    path = run / "adapter" / "remix_config.json"
    values = json.loads(path.read_text())
    values["adapter"]["pool_size"] = 10**9
    del values["sha256"]
    path.write_text(json.dumps(values | {"format": 2}))
    code = (
        "import sys; from pathlib import Path; from remix_cli.folders import check_run\n"
        "from remix_cli.errors import ArtefactError\n"
        f"try: check_run(Path({str(run)!r}))\n"
        "except ArtefactError as error: print(error, 'torch' in sys.modules)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = alone(code)
    told, memory = done.stdout.splitlines()
    assert "does not describe adapter.safetensors beside it" in told
    assert told.endswith("False")
    assert int(memory) < 200_000  # KiB


def test_the_adapter_of_another_run_is_refused_without_loading_torch(project, tmp_path):
    """One of another method or size would be scored, compared and exported as this run's."""
    run = shutil.copytree(project / "runs" / "x", tmp_path / "run")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  rank: 3\n", "  rank: 2\n"))
    with pytest.raises(ArtefactError, match=r"run/adapter: an adapter of rank 3, but .*recipe.yaml says rank 2"):
        check_run(run)


def test_names_that_no_file_system_takes(verb, project):
    name = "a" * 300
    for ask in (["eval", name], ["generate", name, "x"], ["route-stats", name], ["compare", name, name]):
        assert name in verb(*ask, expect=5)[1]
    assert "aaa...: the name is too long" in verb("export", project / "runs" / "x", "-o", name, expect=2)[1]
    assert "aaa...: the name is too long" in verb("train", name, expect=2)[1]
    for key in (f"output_dir={name}", f"data.train.0.path={name}"):
        verb("train", project / "r.yaml", f"model.name_or_path={project}/models/tiny", key, expect=2)


DAMAGE = {
    "empty": b"",
    "not JSON": b'{"steps": 4,',
    "not UTF-8": b'{"steps": "\xff"}',
    "a list": b"[1]",
    "a number": b"5",
    "fields missing": b'{"steps": 4, "results": [{}], "model": "adapter"}',
    "fields of another kind": b'{"steps": "4", "parameters": 3, "results": {"a": 1}, "model": 7}',
    "nested": b"[" * 100_000,
    "a folder": None,
}


def damage(path, how):
    path.unlink()
    if DAMAGE[how] is None:
        path.mkdir()
    else:
        path.write_bytes(DAMAGE[how])


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    from remix_cli.evaluation.evaluator import evaluate
    from remix_cli.recipe import Task
    from remix_cli.runs import load_run
    from remix_cli.tasks.base import Settings

    folder = shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "run")

    class Silent:
        def advance(self, *_):
            pass

    evaluate(load_run(folder), [Task(task="nll")], Settings(limit=4), lambda *_: Silent())
    return folder


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_summary_or_report_is_named(verb, evaluated, tmp_path, how):
    run = shutil.copytree(evaluated, tmp_path / "run")
    damage(run / "summary.json", how)
    with pytest.raises(ArtefactError, match=r"summary\.json"):
        train(load_recipe(run / "recipe.yaml", [f"output_dir={run}"]), Console(quiet=True), resume=True)
    assert "summary.json" in verb("compare", run, evaluated, expect=5)[1]
    shutil.copy(evaluated / "summary.json", tmp_path / "good")
    run = shutil.copytree(evaluated, tmp_path / "again")
    damage(run / "eval" / "adapter.json", how)
    assert "adapter.json" in verb("compare", evaluated, run, expect=5)[1] or how == "a folder"
    if how != "a folder":
        assert "adapter.json" in verb("export", run, "-o", tmp_path / "hf", expect=5)[1]
        assert not (tmp_path / "hf").exists()


LINES = {
    "no prompt": lambda line: line.pop("prompt"),
    "no score": lambda line: line.pop("nats"),
    "a score that is text": lambda line: line.update(nats="x"),
    "one line too few": None,
}


@pytest.mark.parametrize("how", LINES)
def test_lines_of_an_evaluation_without_what_they_must_hold_are_named(verb, evaluated, tmp_path, how):
    run = shutil.copytree(evaluated, tmp_path / "run")
    (path,) = (run / "eval").glob("adapter-nll*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if LINES[how] is None:
        (other,) = (evaluated / "eval").glob("adapter-nll*.jsonl")
        lines = lines[:-1]
        kept = other.read_text()
        other.write_text("".join(json.dumps(line) + "\n" for line in lines))  # and the same of the other run
    else:
        LINES[how](lines[1])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, err = verb("compare", evaluated, run, expect=5)
    assert "evaluate again" in err
    if LINES[how] is None:
        other.write_text(kept)


def test_history_of_damaged_metrics(verb, evaluated, tmp_path):
    for how in DAMAGE:
        run = shutil.copytree(evaluated, tmp_path / how)
        damage(run / "metrics.jsonl", how)
        assert "metrics.jsonl" in verb("route-stats", run, "--history", expect=5)[1]


def test_a_models_config_that_is_damaged(verb, stage, tmp_path):
    for how in ("empty", "a list", "not UTF-8", "nested"):
        model = shutil.copytree(stage[0], tmp_path / how)
        damage(model / "config.json", how)
        ask = ["--task", "nll", "--data", stage[1]]
        assert "config.json" in verb("eval", model, *ask, expect=5)[1]
    _, err = verb("route-stats", stage[0], expect=5)
    assert "a model, not a run" in err


def test_a_recipe_of_a_run_that_is_damaged(verb, evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(f"{RUN_FROM}[1\n{yaml.safe_dump(values)}")  # the record of where is not needed
    assert RunFolder(run).load_recipe() == RunFolder(evaluated).load_recipe()
