"""configs/cards: every recipe validates without its base, uses its card, and its header says what the estimate says."""

import json
import re
import runpy
import sys
from typing import Any

import pytest
import yaml
from helpers.common import ROOT
from helpers.tiny import recipe_text, tiny_model, write_recipe

from remix_cli.diagnostics.parameters import count_parameters
from remix_cli.methods.apply import apply_method
from remix_cli.models import known_base, skeleton
from remix_cli.recipe import load_recipe
from remix_cli.train.memory import estimate_memory

CARDS = sorted((ROOT / "configs" / "cards").glob("*.yaml"))
NAME = re.compile(r"(?P<base>[\w.-]+)-(?P<card>\d+)gb")
OF_THE_CARD = {  # all in which the recipes of one base differ
    ("model", "quantization"),
    ("train", "per_device_train_batch_size"),
    ("train", "gradient_accumulation_steps"),
    ("train", "gradient_checkpointing"),
}
counted: dict[str, Any] = {}


def named(path) -> tuple[str, int]:
    """The base and the card's GB."""
    found = NAME.fullmatch(path.stem)
    assert found, path
    return found["base"], int(found["card"])


def estimate_of(path, times: int = 1) -> float:
    """GiB, at so many times its rows. A base is counted once, since its recipes have the same adapter."""
    recipe = load_recipe(path)
    rows = recipe.train.per_device_train_batch_size * times
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"per_device_train_batch_size": rows})})
    name = recipe.model.name_or_path
    if name not in counted:
        base = known_base(recipe.model)
        assert base is not None
        adapter = apply_method(skeleton(base), recipe.adapter_config(), seed=0)
        counted[name] = adapter.model, count_parameters(adapter)
    return sum(estimate_memory(recipe, *counted[name], recipe.data.max_length).values())


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_card_is_used_and_not_overfull(path):
    """A card of 24 GB holds at least 24e9 bytes, before the driver takes its share."""
    _, card = named(path)
    assert 0.5 <= estimate_of(path) * 2**30 / (card * 1e9) <= 0.92


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_twice_the_rows_would_not_fit_or_be_more_than_a_step(path):
    _, card = named(path)
    fits = 0.92 * card * 1e9 / 2**30
    rows = load_recipe(path).train.per_device_train_batch_size
    assert rows == 32 or estimate_of(path, 2) > fits


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_header_says_what_the_recipe_and_the_estimate_say(path):
    base, card = named(path)
    header = re.match(r"(# ?.*\n)+", path.read_text()).group()
    assert header.splitlines()[0] == f"# remix train configs/cards/{path.name}"
    recipe = load_recipe(path)
    assert f"one card of {card} GB" in header
    assert f"Memory: {estimate_of(path):.1f} GiB by the estimate" in header
    rows, length = recipe.train.per_device_train_batch_size, recipe.data.max_length
    assert f"{rows} rows of at most {length} tokens" in header
    assert ("4 bits" in header) == (recipe.model.quantization == "4bit")
    assert ("recomputed" in header) == recipe.train.gradient_checkpointing
    assert recipe.model.name_or_path.split("/")[1].lower() == base.replace("llama3.1", "llama-3.1")
    assert recipe.output_dir == f"runs/{path.stem}"


def test_recipes_of_one_base_train_alike_and_differ_in_how_they_use_the_card():
    """Whatever the card, a step has the same rows."""
    alike: dict[str, dict] = {}
    for path in CARDS:
        recipe, text = load_recipe(path), yaml.safe_load(path.read_text())
        assert recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps == 32
        for group, key in OF_THE_CARD:
            text[group].pop(key, None)
        del text["output_dir"]
        assert alike.setdefault(named(path)[0], text) == text
    assert len(alike) == 4


def test_the_page_lists_them_all_with_their_figures():
    page = (ROOT / "docs" / "cards.md").read_text()
    rows = re.findall(
        r"^\| \S.* \| (\d+) GB \| `configs/cards/(\S+)` \| (\d+) \| (.*) \| ([\d.]+) \| ([\d.]*) +\| ([\d,]*) +\|$",
        page,
        re.MULTILINE,
    )
    assert sorted(row[1] for row in rows) == [path.name for path in CARDS]
    for card, name, batch, how, gib, peak, pace in rows:
        path = ROOT / "configs" / "cards" / name
        recipe = load_recipe(path)
        assert int(card) == named(path)[1]
        assert int(batch) == recipe.train.per_device_train_batch_size
        assert gib == f"{estimate_of(path):.1f}"
        assert not peak or 0.99 < float(peak) / estimate_of(path) < 1.05, "what an H200 allocated at most"
        assert bool(peak) == (f"{peak} GiB, {pace} tokens/s" in path.read_text())
        assert ("4 bits" in how) == (recipe.model.quantization == "4bit")
        assert ("recomputed" in how) == recipe.train.gradient_checkpointing


# One of each base: the others differ in nothing that makes a recipe valid, as a test above says.
@pytest.mark.parametrize("path", [path for path in CARDS if named(path)[1] == 12], ids=lambda path: path.stem)
def test_validate_takes_them_without_the_base_and_gives_the_same_estimate(path, verb):
    found = json.loads(verb("validate", path, "--json")[0])
    assert found["base"] == "shape known, weights not looked at"
    assert sum(found["memory_gib"].values()) == pytest.approx(estimate_of(path), abs=0.01)


@pytest.mark.slow
def test_the_benchmark_measures_recipes_at_two_sizes(tmp_path, monkeypatch, capsys):
    """In 4 bits, too; the weights are random, and on a CPU there is no peak."""
    tiny_model(vocab_size=40_000, hidden_size=64, intermediate_size=512).save_pretrained(tmp_path / "base")
    recipes = []
    for name, bits in (("plain", "none"), ("packed", "4bit")):
        text = recipe_text(tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "out", data={"max_length": 64})
        text["model"]["quantization"] = bits
        text["train"] |= {"gradient_checkpointing": bits == "4bit"}
        recipes.append(write_recipe(tmp_path / f"{name}.yaml", text))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    arguments = ["--recipes", *recipes, "--repeats", 1, "--json", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["bench_growth.py", *map(str, arguments)])
    script = runpy.run_path(str(ROOT / "scripts" / "bench_growth.py"), run_name="__main__")
    assert "a step at the longest micro-batch" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["recipe"], row["rows"]) for row in rows] == [(n, r) for n in ("plain", "packed") for r in (2, 4)]
    assert all(row["ms"] > 0 for row in rows)
    assert rows[0]["estimated"] < rows[1]["estimated"]
    assert rows[3]["estimated"] < rows[1]["estimated"]
    packed = script["random_base"](load_recipe(recipes[1]).model, script["torch"].device("cpu"))
    kinds = {name: type(module).__name__ for name, module in packed.named_modules()}
    assert kinds["model.layers.0.mlp.up_proj"] == "Linear4bit"
    assert kinds["lm_head"] == "Linear"
    assert packed.model.layers[0].mlp.up_proj.weight.numel() == 64 * 512 // 2
