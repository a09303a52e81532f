"""`train --dry-run` says what would be done, and does nothing."""

import json

import pytest
from helpers.tiny import recipe_text, write_recipe

from remix_cli.recipe import machine


@pytest.fixture
def recipe(stage, tmp_path):
    model, rows, _ = stage
    return write_recipe(tmp_path / "recipe.yaml", recipe_text(model, rows, tmp_path / "out"))


def test_a_dry_run_says_what_validate_says_and_writes_nothing(verb, recipe, tmp_path):
    out, _ = verb("train", recipe, "--dry-run", "train.max_steps=7")
    assert out == verb("validate", recipe, "train.max_steps=7")[0]
    assert "steps     7 of 4 rows each; a step takes its rows through the model 2 times" in out
    assert ", 5,968 parameters, float32 method" in " ".join(out.split())
    assert "method    remix: k of n LoRAs" in out
    assert f"writes {tmp_path}/out " in " ".join(out.split())
    assert "together" in out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_why_nothing_would_be_written(verb, stage, finished, tmp_path):
    model, rows, _ = stage
    there = write_recipe(tmp_path / "there.yaml", recipe_text(model, rows, finished))
    for flags, said in (
        ([], f"nothing: output_dir: {finished} holds a run; add --resume to go on or --overwrite to replace it"),
        (["--resume"], f"{finished}, going on with the run that it holds"),
        (["--overwrite"], f"{finished}, in place of the run that it holds"),
    ):
        out, _ = verb("train", there, "--dry-run", *flags)
        assert " ".join(f"writes {said}".split()) in " ".join(out.split())
        assert json.loads(verb("train", there, "--dry-run", "--json", *flags)[0])["output"] == said
    assert (finished / "summary.json").is_file()


def test_a_type_that_the_machine_chose_is_told_before_and_while_training(verb, stage, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "out", train={"max_steps": 1})
    del recipe["model"]["dtype"]
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    for arguments in (["validate", path], ["train", path]):
        out, _ = verb(*arguments)
        assert (
            "dtype     float32, for this CPU computes slowly in bfloat16; model.dtype says\n          otherwise\n"
            in out
        )
    assert "dtype: float32" in (tmp_path / "out" / "recipe.yaml").read_text()
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    out, _ = verb("train", path, "--resume")
    assert "already complete" in " ".join(out.split())
