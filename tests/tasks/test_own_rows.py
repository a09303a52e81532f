"""Rows of one's own are scored without code: exact match, and the likeliest of some options."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.tiny import WORDS, recipe_text, write_recipe

from remix_cli.data.formats import RowError
from remix_cli.recipe.schema import Task
from remix_cli.tasks.choice import options_of
from remix_cli.tasks.exact_match import ExactMatch, plain, references_in

SUMS = [("w1 w2", "w5 #### 3"), ("w2 w3", "w6 #### 5"), ("w3 w4", "w5 #### 7"), ("w1 w4", "w6 #### 5")] * 4
QUESTIONS = [("w1 ?", "w4", "w5", "w6", "B"), ("w2 ?", "w7", "w4", "w5", "A"), ("w3 ?", "w5", "w4", "w7", "C")] * 5
RECIPE = """
model: {{name_or_path: {model}, dtype: float32}}
adapter: {{pool_size: 4, active: 2, rank: 3}}
data:
  max_length: 32
  train: [{{path: {rows}, {read}}}]
  validation_fraction: 0.2
train: {{max_steps: 2, eval_tasks_limit: 3}}
eval:
  tasks:
    - {task}
output_dir: {output}
"""


def tables(folder, names, rows):
    """The same rows as csv and as jsonl."""
    (folder / "rows.csv").write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.csv", folder / "rows.jsonl"


def scored(verb, stage, tmp_path, rows, read, task):
    text = RECIPE.format(model=stage[0], rows=rows, read=read, task=task, output=tmp_path / f"out-{rows.suffix[1:]}")
    assert len(text.strip().splitlines()) <= 15
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    verb("train", path)
    run = yaml.safe_load(text)["output_dir"]
    metrics = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    (result,) = json.loads(verb("eval", run, "--json")[0])["results"]
    return result, metrics


def test_word_problems_are_scored_by_what_an_expression_finds(verb, stage, tmp_path):
    assert {word for row in SUMS for text in row for word in text.split()} <= {*WORDS, "7"}
    read = 'prompt: "{question}", completion: "{answer}"'
    found = []
    for rows in tables(tmp_path, ("question", "answer"), SUMS):
        keys = "task: exact_match, name: sums, max_new_tokens: 8, extract: '#### (.+)'"
        task = f"{{{keys}, source: {{path: {rows}, {read}}}}}"
        result, metrics = scored(verb, stage, tmp_path, rows, read, task)
        assert result["task"] == "sums"
        assert result["count"] == len(SUMS)
        assert result["scores"].keys() == {"accuracy", "has_answer"}
        assert all("sums/accuracy" in line for line in metrics if "eval_loss" in line)
        found.append(result["scores"])
    assert found[0] == found[1], "csv and jsonl are the same rows"


def test_a_whole_answer_is_cut_where_it_can_no_longer_be_right(verb, stage, tmp_path, monkeypatch):
    """References have three tokens, so nothing longer than 16 is one; an expression may look further on."""
    monkeypatch.setattr(ExactMatch, "max_new_tokens", 200)  # the tiny model reads no more than 256
    _, rows = tables(tmp_path, ("question", "answer"), SUMS)
    read = 'prompt: "{question}", completion: "{answer}"'
    lengths = []
    for more in ("", ", extract: '#### (.+)'", ", max_new_tokens: 5"):
        task = f"{{task: exact_match{more}, source: {{path: {rows}, {read}}}}}"
        result, _ = scored(verb, stage, tmp_path, rows, read, task)
        lengths.append(result["protocol"]["decoding"])
        shutil.rmtree(tmp_path / "out-jsonl")
    assert lengths == [f"greedy, at most {length} new tokens" for length in (16, 200, 5)]


def test_questions_with_options_are_scored_by_likelihood(verb, stage, tmp_path):
    read = 'prompt: "{question}", completion: "{A}"'
    found = []
    for rows in tables(tmp_path, ("question", "A", "B", "C", "key"), QUESTIONS):
        task = f"{{task: choice, options: [A, B, C], answer: key, source: {{path: {rows}, {read}}}}}"
        result, metrics = scored(verb, stage, tmp_path, rows, read, task)
        assert result["scores"].keys() == {"accuracy", "accuracy_norm"}
        assert result["count"] == len(QUESTIONS)
        assert any("choice/accuracy" in line for line in metrics)
        found.append(result["scores"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("row", "columns", "answer", "right"),
    [
        ({"a": "x", "b": "y", "key": "b"}, ["a", "b"], "key", 1),
        ({"a": "x", "b": "y", "key": "x"}, ["a", "b"], "key", 0),
        ({"options": ["x", "y"], "key": 1}, "options", "key", 1),
        ({"options": ["x", "y"], "key": "y"}, "options", "key", 1),
        ({"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "key": "B"}, "choices", "key", 1),
        ({"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "key": "1"}, "choices", "key", 0),
    ],
)
def test_an_answer_is_a_label_a_text_or_a_number(row, columns, answer, right):
    assert options_of(row, columns, answer) == (["x", "y"], right)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"options": ["x", "y"], "key": "z"}, "options", "'z', which is no label, option or number from 0 to 1"),
        ({"options": ["x", "y"], "key": 2}, "options", "number from 0 to 1"),
        ({"options": ["x", "x"], "key": "x"}, "options", "no label"),
        ({"options": "x", "key": "x"}, "options", "should be a list of options"),
        ({"options": ["x"], "key": "x"}, "options", "two options or more"),
        ({"key": "x"}, "options", "no column 'options'"),
    ],
)
def test_options_that_do_not_say_which_is_right(row, columns, message):
    with pytest.raises(RowError, match=message):
        options_of(row, columns, "key")


def test_a_row_that_cannot_be_scored_is_named_by_its_file(verb, stage, tmp_path):
    """By its number there, however few are scored."""
    own = tmp_path / "own.jsonl"
    lines = [json.dumps({"prompt": "w1", "completion": "w2", "right": right}) for right in ("w2", "w3", "")]
    own.write_text("\n".join(lines))
    task = {"task": "exact_match", "source": {"path": str(own)}, "references": "right", "limit": 2, "max_new_tokens": 4}
    recipe = recipe_text(*stage[:2], tmp_path / "out", eval={"tasks": [task]})
    err = verb("validate", write_recipe(tmp_path / "recipe.yaml", recipe), expect=2)[1]
    assert f"eval task exact_match: {own}: row 3: column 'right' should hold a reference" in err


def test_what_is_not_compared():
    assert plain(" The  Eiffel Tower. ", []) == "The Eiffel Tower."
    assert plain("The Eiffel Tower.", ["case", "punctuation", "articles"]) == "eiffel tower"
    assert references_in({"r": ["a", "b"]}, "r") == ["a", "b"]
    with pytest.raises(RowError, match="'r' should hold a reference"):
        references_in({"r": ["a", ""]}, "r")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "nll", "extract": "a"}, "is for exact_match, and this is nll"),
        ({"task": "exact_match", "options": "a"}, "is for choice, and this is exact_match"),
        ({"task": "exact_match", "extract": "("}, "not a regular expression"),
        ({"task": "exact_match", "name": "a/b"}, "should match"),
    ],
)
def test_keys_of_a_task_that_it_does_not_read_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Task(**keys)


def test_younger_keys_leave_a_task_of_earlier_versions_as_it_was():
    """Results carry a hash of their task."""
    assert Task(task="nll").model_dump().keys() == {
        "task",
        "source",
        "limit",
        "shots",
        "shots_from",
        "max_new_tokens",
        "samples",
        "temperature",
    }


def test_plain_text_holds_no_question(verb, stage, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 4)
    recipe = recipe_text(*stage[:2], tmp_path / "out")
    recipe["data"]["train"] = [{"path": str(tmp_path / "rows.jsonl"), "format": "text"}]
    recipe["data"]["validation"] = recipe["data"]["train"]
    recipe["data"] |= {"allow_overlap": True}
    del recipe["data"]["validation_fraction"]
    verb("train", write_recipe(tmp_path / "recipe.yaml", recipe))
    assert json.loads(verb("eval", tmp_path / "out", "--json")[0])["results"][0]["count"] == 4
    err = verb("eval", tmp_path / "out", "--task", "exact_match", "--max-new-tokens", 4, expect=2)[1]
    assert "rows of format text hold no question" in err


def test_a_task_without_a_format_reads_a_file_as_the_runs_rows_were_read(verb, finished, stage, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    asked = ["--task", "exact_match", "--data", stage[1], "--limit", 3, "--max-new-tokens", 4, "--json"]
    (result,) = json.loads(verb("eval", tmp_path / "run", *asked)[0])["results"]
    assert (result["task"], result["count"]) == (f"exact_match@{stage[1].stem}", 3)
