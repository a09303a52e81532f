"""Every command that README.md and docs/ print is parsed; the scripts run at tiny size."""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from helpers.common import ROOT, close
from helpers.tiny import recipe_text, tiny_model, write_recipe

from remix_cli.cli import app
from remix_cli.recipe import load_recipe
from remix_cli.recipe.sweep_grammar import load_sweep

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = re.compile(r"([A-Z_]+=\S+ )?((remix|make|accelerate launch) (?!.*--- )|(python )?scripts/\S+)")
FILLED_IN = {"N": "2", "RECIPE": "configs/gsm8k.yaml"}


def printed() -> list[tuple[str, str]]:
    """(page, command): lines of code blocks, continued ones joined, and what stands in backticks."""
    found = []
    for page in PAGES:
        fenced = False
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            fenced ^= line.startswith("```")
            block = fenced or line.startswith("    ")
            parts = [line.strip()] if block else re.findall(r"`([^`]+)`", line)
            found += [(page.name, part) for part in parts if OURS.match(part)]
    return list(dict.fromkeys(found))


def words(command: str) -> list[str]:
    """As a shell splits it, with something in the place of what the reader is to fill in."""
    command = command.removeprefix("ACCELERATE_USE_CPU=true ")
    plain = re.sub(r"\[(--[^\]]*)\]", r"\1", command.split(" | ")[0])  # options in brackets are options
    plain = re.sub(r"\b(\w+)(\|\w+)+$", r"\1", plain)  # the first of several values
    return [FILLED_IN.get(word, word) for word in shlex.split(plain, comments=True)]


COMMANDS = printed()


def test_the_pages_hold_commands_of_every_verb():
    verbs = set(typer.main.get_command(app).commands)
    assert {words(command)[1] for _, command in COMMANDS if command.startswith("remix ")} >= verbs


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_printed_command_is_understood(page, command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    first, *rest = words(command)
    if first == "make":
        assert re.search(rf"^{rest[-1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif first == "accelerate":
        assert all((ROOT / file).is_file() for file in rest if file.endswith(".yaml"))
        understood(rest[rest.index("remix_cli") + 1 :], tmp_path)
    elif first == "remix":
        understood(rest, tmp_path)
    elif first == "python":
        parsed_by_script(rest, monkeypatch)
    elif rest:
        of_the_paper(command, tmp_path)
    else:
        assert (ROOT / first).is_file()


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: headings as GitHub spells them, and ids that the page gives itself."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    spelt = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return spelt | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https:", "http:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_gallery_shows_every_picture_and_the_command_that_draws_it():
    """And each is small enough for a repository."""
    parts = re.split(r"^## ", (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = set()
    for part in parts:
        pictures = re.findall(r"!\[[^\]]+\]\((pictures/[^)]+)\)", part)
        commands = re.findall(r"^    remix .*--plot", part.replace("\\\n", ""), flags=re.MULTILINE)
        assert len(commands) == len(pictures), part
        shown |= {ROOT / "docs" / name for name in pictures}
    assert shown == set((ROOT / "docs" / "pictures").glob("*.svg"))
    assert all(picture.stat().st_size < 60_000 for picture in shown)


def understood(arguments: list[str], folder: Path) -> None:
    """The verb exists, and its options; so does a recipe of ours, and the keys of the overrides."""
    if arguments[0] == "--help":
        return
    verb = typer.main.get_command(app).commands[arguments[0]]
    if len(arguments) == 1 or arguments[1].startswith("-"):  # a verb that a sentence speaks of
        assert set(arguments[1:2]) <= {option for parameter in verb.params for option in parameter.opts}
        return
    given = verb.make_context(arguments[0], arguments[1:]).params
    mine = write_recipe(folder / "recipe.yaml", recipe_text(Path("model"), Path("rows.jsonl"), Path("out")))
    if str(given.get("recipe")) == mine.name:
        load_recipe(mine, list(given["overrides"] or []))
    elif str(given.get("recipe")).startswith(("configs/", "docs/")):
        load = load_sweep if arguments[0] == "sweep" else load_recipe
        load(Path(given["recipe"]), list(given["overrides"] or []))


def parsed_by_script(arguments: list[str], monkeypatch) -> None:
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given):
        parse(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    with pytest.raises(Parsed):
        runpy.run_path(arguments[0], run_name="__main__")


def of_the_paper(command: str, folder: Path) -> None:
    """What the script asks `remix` for is a sweep that loads."""
    remix = folder / "remix"
    remix.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    remix.chmod(0o755)
    environment = os.environ | {"REMIX": str(remix)}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    name, *arguments = json.loads(done.stdout)
    given = typer.main.get_command(app).commands[name].make_context(name, arguments).params
    assert load_sweep(Path(given["recipe"]), list(given["overrides"] or [])).points


def script(monkeypatch, capsys, name, *arguments) -> str:
    """What scripts/NAME prints."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(f"scripts/{name}", run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "row"),
    [
        ("bench_step.py", ["--batch", 2, "--length", 16, "--rounds", 1, "--only", "frozen, M = 1$"], "frozen, M = 1"),
        ("bench_generate.py", ["--batches", 1, "--prompt", 8, "--new", 2], "ReMix, as remix eval does"),
        pytest.param("bench_growth.py", ["--batch", 2, "--length", 16], "a step of rtg", marks=pytest.mark.slow),
    ],
)
def test_the_benchmarks_run(name, arguments, row, tmp_path, monkeypatch, capsys):
    tiny_model(vocab_size=40_000).save_pretrained(tmp_path)  # they draw tokens below that
    printed = script(monkeypatch, capsys, name, "--model", tmp_path, "--repeats", 1, *arguments)
    assert row in " ".join(printed.split())  # a title with a long folder wraps


def test_the_order_of_products_is_measured_and_both_are_the_same(monkeypatch, capsys):
    printed = script(monkeypatch, capsys, "bench_orders.py", "--repeats", 3, "--tokens", 8)
    (row,) = [line.split() for line in printed.splitlines() if "576 x 1536" in line and " 32 " in line]
    assert [float(value) < 1e-3 for value in row[-2:]] == [True, True], "what rounding loses of float32"
    bench = runpy.run_path("scripts/bench_orders.py")
    used, merged, x, _, a, b = bench["both"](24, 16, 4, 8, torch.device("cpu"), torch.float32)
    gradients = []
    for order in (used, merged):
        order(x).square().sum().backward()
        gradients.append([tensor.grad.clone() for tensor in (x, a, b)])
        for tensor in (x, a, b):
            tensor.grad = None
    assert all(close(m, u, 1e-5) for u, m in zip(*gradients, strict=True))


def test_the_synthetic_study_writes_a_sweep_that_loads(tmp_path, monkeypatch, capsys):
    """Its base model is trained for two steps, and its sweep is loaded, not run."""
    monkeypatch.chdir(ROOT)
    study = runpy.run_path("scripts/study_synthetic.py")
    study["write_base_model"].__defaults__ = (2,)
    asked = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: asked.append(command) or subprocess.CompletedProcess(command, 0)
    )
    monkeypatch.setattr(sys, "argv", ["study_synthetic.py", "--out", str(tmp_path), "--only", "rtg-M2$"])
    with pytest.raises(SystemExit) as ended:
        study["main"]()
    assert ended.value.code == 0
    ((_, _, package, verb, *arguments),) = asked
    assert (package, verb) == ("remix_cli", "sweep")
    given = typer.main.get_command(app).commands[verb].make_context(verb, arguments).params
    sweep = load_sweep(Path(given["recipe"]), [], given["only"])
    assert {name: len(points) for name, points in sweep.points.items()} == {"rtg-M2": 4}
    assert sum(1 for _ in (tmp_path / "train.jsonl").open()) == 4000


def test_the_screen_of_routers_trains_its_arms_side_by_side(stage, tmp_path, monkeypatch):
    """Arms alike end alike; a fixed router keeps its choices, one that learns does not; everyone learns something."""
    rows = [json.loads(line) for line in Path(stage[1]).read_text(encoding="utf-8").splitlines()]
    pairs = [{"prompt": r["question"], "completion": r["answer"], "task": "sums"} for r in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = recipe_text(stage[0], tmp_path / "rows.jsonl", tmp_path / "run")
    recipe["data"]["train"] = [{"path": str(tmp_path / "rows.jsonl"), "task": "sums"}]
    recipe["train"] |= {"learning_rate": 0.05, "max_steps": 6}
    small = {"pool_size": 4, "active": 2, "rank": 2}
    arms = {
        "fixed": small,
        "the same": small,
        "narrow": {"pool_size": 2, "active": 1, "rank": 2, "token": "centred"},
        "known": small | {"oracle": True},
        "straight": small | {"estimator": "straight_through", "router_learning_rate": 0.3},
        "rtg": small | {"estimator": "rtg", "router_learning_rate": 0.3, "start": 0.5},
        "one": small | {"estimator": "control_variate", "selections": 1, "token": "none", "prompt": "raw"},
        "both": small | {"prompt": "centred", "prompt_weight": 0.5},
        "clusters": small | {"token": "none", "prompt": "centred", "clusters": 3, "first": True},
        "once": small | {"estimator": "straight_through", "token": "none", "prompt": "centred", "shared": True},
    }
    (tmp_path / "arms.json").write_text(json.dumps(arms))
    names = ("recipe.yaml", "arms.json", "rows.jsonl", "out.jsonl")
    write_recipe(tmp_path / "recipe.yaml", recipe)
    monkeypatch.setattr(
        sys, "argv", ["screen_routers.py", *(str(tmp_path / name) for name in names), "--at-once", "10"]
    )
    runpy.run_path("scripts/screen_routers.py", run_name="__main__")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    found = {line["arm"]: line for line in map(json.loads, lines)}
    assert found.keys() == arms.keys()
    assert found["fixed"]["test"] == found["the same"]["test"]
    assert found["fixed"]["kept"] == found["narrow"]["kept"] == 1
    assert found["straight"]["kept"] < 1
    assert found["rtg"]["kept"] < 1
    assert found["once"]["kept"] < 1
    assert all(line["test"]["loss"] < 4.1 for line in found.values())  # from 4.16


def test_rows_of_many_skills_are_split_without_overlap(tmp_path):
    make = runpy.run_path("scripts/make_skills.py")
    make["main"](tmp_path, {"chain_sum": {"max_terms": 2}, "coin_flip": {}}, train=8, test=3)
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (tmp_path / "train" / "chain_sum.jsonl").read_text().splitlines()]
    assert [row["task"] for row in test] == ["chain_sum"] * 3 + ["coin_flip"] * 3
    assert len(train) == 8
    assert all(row["prompt"].count("+") + row["prompt"].count(" - ") == 1 for row in train)  # two terms
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
