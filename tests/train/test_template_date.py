"""Chat templates that write the date: a run keeps the day on which it was begun."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.runs import TRAIN, recipe_for, run
from helpers.tiny import recipe_text, write_recipe
from helpers.workers import in_this_process
from transformers.utils import chat_template_utils

from remix_cli.data import template
from remix_cli.errors import DataError, RecipeError
from remix_cli.recipe import load_recipe
from remix_cli.runs import load_run
from remix_cli.train import resume, trainer


@pytest.fixture
def dated(stage, tmp_path):
    """The stage with a model whose template begins with the day of the month."""
    model = shutil.copytree(stage[0], tmp_path / "model")
    file = model / "chat_template.jinja"
    file.write_text("{{ 'w' ~ (strftime_now('%d') | int) ~ ' ' }}" + file.read_text())
    return model, *stage[1:]


def today_is(monkeypatch, day):
    """For us and for transformers."""

    class Day(template.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    class Now(chat_template_utils.datetime):
        @classmethod
        def now(cls, *_):
            return cls.fromisoformat(day)

    monkeypatch.setattr(template, "date", Day)
    monkeypatch.setattr(chat_template_utils, "datetime", Now)


def rows_of(folder):
    return json.loads(next(folder.rglob("manifest.json")).read_text())["origin"]["data"]


def test_a_run_that_goes_on_tomorrow_has_the_rows_of_today(dated, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    today_is(monkeypatch, "2026-11-28")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step_ends", lambda self: self.state.step == 2 and self._stop())
        with pytest.raises(Exception, match="interrupted after step 2"):
            run(recipe_for(dated, folder))
    before = rows_of(folder)
    today_is(monkeypatch, "2026-11-29")
    asked = recipe_for(dated, folder)
    assert asked.data.template_date is None
    assert run(asked, resume=True)["steps"] == TRAIN["max_steps"]
    assert rows_of(folder) == before
    assert load_recipe(folder / "recipe.yaml", stored=True).data.template_date == "2026-11-28"
    # what is asked of the run later is asked as it was trained
    loaded = load_run(folder)
    ids = loaded.encoder.question_ids("w3")
    assert loaded.tokenizer.decode(ids).split()[0] == "w28"
    # a run that is begun tomorrow has tomorrow's, or those of the day that its recipe names
    run(recipe_for(dated, tmp_path / "next"))
    assert rows_of(tmp_path / "next") != before
    named = asked.with_date("2026-11-28").model_copy(update={"output_dir": str(tmp_path / "named")})
    run(named)
    assert rows_of(tmp_path / "named") == before
    other = asked.with_date("2026-11-27")
    with pytest.raises(RecipeError, match=r"data.template_date: '2026-11-27', but .* was begun with '2026-11-28'"):
        resume.check_same_recipe(other, load_recipe(folder / "recipe.yaml", stored=True), resume.RunFolder(folder))


def test_the_runs_of_a_sweep_have_the_same_day(dated, tmp_path, verb, monkeypatch):
    in_this_process(monkeypatch)
    recipe = recipe_text(*dated[:2], tmp_path / "out", train={"max_steps": 1})
    today_is(monkeypatch, "2026-11-28")
    arms = {"A": {"adapter.rank": 2}, "B": {"adapter.rank": 3}}
    path = write_recipe(tmp_path / "sweep.yaml", recipe | {"sweep": {"arms": arms}})
    verb("sweep", path, "--only", "A")
    today_is(monkeypatch, "2026-11-29")
    verb("sweep", path)
    for run_of in ("A", "B"):
        (file,) = (tmp_path / "out" / run_of).glob("*/recipe.yaml")
        assert load_recipe(file, stored=True).data.template_date == "2026-11-28"


def test_a_day_that_no_template_writes_or_that_is_none_is_refused(stage, tmp_path):
    data = {"data": {"train": [{"path": str(stage[1]), "format": "gsm8k"}], "template_date": "2026-11-28"}}
    with pytest.raises(DataError, match=r"data.template_date: this tokenizer has no chat template that writes a date"):
        run(recipe_for(stage, tmp_path / "run", **data))
    data["data"]["template_date"] = "28.11.2026"
    with pytest.raises(RecipeError, match=r"data.template_date: should be a day such as 2026-11-28"):
        recipe_for(stage, tmp_path / "run", **data)
    assert not Path(tmp_path / "run").exists()


def test_recipes_without_such_a_template_name_no_day(stage, tmp_path):
    run(recipe_for(stage, tmp_path / "run", train=TRAIN | {"max_steps": 1}))
    assert load_recipe(tmp_path / "run" / "recipe.yaml", stored=True).data.template_date is None
