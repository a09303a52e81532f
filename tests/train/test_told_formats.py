"""Rows as people have them, without a word on their format: accepted as they are, or one line says what to write."""

import gzip
import json

import pytest
from helpers.tiny import TEMPLATE_WITH_TOOLS, recipe_text, write_recipe, write_tiny_model

from remix_cli.recipe import Recipe, load_recipe
from remix_cli.train.told_formats import tell_formats


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE_WITH_TOOLS)
    return folder


@pytest.fixture
def recipe(model, tmp_path):
    """A recipe that says of its rows only where they are, and what `source` says besides."""

    def write(path, **source):
        text = recipe_text(model, path, tmp_path / "out")
        text["data"] |= {"train": [{"path": str(path)} | source], "validation_fraction": 0.0}
        del text["train"]["eval_steps"]
        return write_recipe(tmp_path / "recipe.yaml", text)

    return write


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


CALL = {"function": {"name": "w5", "arguments": '{"w6": "w7"}'}}
SHARED = [
    {"from": "human", "value": "w1"},
    {"from": "gpt", "value": "", "tool_calls": [CALL]},
    {"from": "tool", "value": "w2"},
    {"from": "gpt", "value": "w3"},
]
ASKED = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
# File -> its content, the format that its columns tell, and a row as validate shows it.
SHAPES = {
    "sharegpt.jsonl": (
        lines({"conversations": SHARED, "tools": [{"name": "w5"}], "id": "a-1"}),
        "sharegpt",
        "<user> w5 <user> w1 <bot>« w5 w6 w7 <eos>» <user> w2 <bot>« w3 <eos>»",
    ),
    "alpaca.csv": (
        'instruction,input,output\n"w1\n w2",w4,w3\n',
        "alpaca",
        "<user> w1 w2 w4 <bot>« w3 <eos>»",
    ),
    "conversational.jsonl": (
        lines({"prompt": ASKED[:1], "completion": ASKED[1:]}),
        "prompt_completion",
        "<user> w1 <bot>« w2 <eos>»",
    ),
    "plain.jsonl": (lines({"text": "w1 w2", "url": "w", "timestamp": 3}), "text", "«w1 w2 <eos>»"),
    "numbers.tsv": ("prompt\tcompletion\nw1 2 3\t5\n", "prompt_completion", "<user> w1 2 3 <bot>« 5 <eos>»"),
    "tasks.jsonl.gz": (
        lines({"messages": ASKED, "task": "w1", "weight": 0.5}),
        "messages",
        "<user> w1 <bot>« w2 <eos>»",
    ),
}


def words(text):
    return "".join(text.split())


@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes_are_accepted_as_they_are(name, recipe, tmp_path, verb):
    content, form, shown = SHAPES[name]
    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(content.encode()))
    said = verb("validate", recipe(tmp_path / name))[0]
    assert f"{name}: format {form}, told by the columns " in said
    assert f"{name} ({form}): 1 rows" in said
    assert words(shown) in words(said)


GOOD = {"prompt": "w1", "completion": "w2"}
# File -> its content, what the source says besides, and the one line after the file's name.
WRONG = {
    "null.jsonl": (
        lines(GOOD, GOOD | {"completion": None}),
        {},
        "row 2: column 'completion' should be text, is null; name another column, or take the row out",
    ),
    "format.jsonl": (
        lines(GOOD, {"messages": ASKED}),
        {},
        "row 2: no column 'prompt'; the row has messages; set format: messages",
    ),
    "column.jsonl": (
        lines({"dialogue": ASKED}),
        {"format": "messages"},
        "row 1: no column 'messages'; the row has dialogue; say which one it is: columns: {messages: ...}",
    ),
    "weight.csv": (
        "prompt,completion,weight\nw1,w2,1\nw1,w2,heavy\n",
        {},
        "row 2: column 'weight' is 'heavy', should be a number that is not negative; if it is no weight, set "
        "columns: {weight: null}",
    ),
    "negative.jsonl": (
        lines(GOOD | {"w": 1}, GOOD | {"w": -1}),
        {"columns": {"weight": "w"}},
        "row 2: column 'w' is -1, should be a number that is not negative; if it is no weight, set "
        "columns: {weight: null}",
    ),
    "task.jsonl": (
        lines(GOOD | {"task": "w1 " * 40}),
        {},
        "row 1: column 'task' should be a task's name, and has 119 characters; if it is something else, set "
        "columns: {task: null}",
    ),
    "thinking.jsonl": (
        lines({"messages": ASKED}, {"messages": [ASKED[0], ASKED[1] | {"thinking": "w9"}]}),
        {},
        "row 2: column 'messages': the chat template leaves out what message 2 (assistant) thinks "
        "(reasoning_content); use a template "
        "that shows it, or take it out of the row",
    ),
    "blank.tsv": (
        "prompt\tcompletion\nw1\tw2\nw1\t \n",
        {},
        "row 2: column 'completion': the answer is blank; write one, or take the row out",
    ),
    "other.csv": (
        "prompt;completion\nw1;w2\n",
        {},
        "the first line names one column, 'prompt;completion'; set separator: ';'",
    ),
    "tools.jsonl": (
        lines({"messages": ASKED, "tools": "w5"}),
        {},
        "row 1: column 'tools' should be JSON, is 'w5'",
    ),
}
# What no row is at fault for: the line as a whole.
UNTOLD = {
    "none.jsonl": (
        lines({"id": 3, "context": "w1", "query": "w2", "reply": "w3"}),
        {},
        "data.train.0.format: {path} has the columns id, context, query, reply, which tell no format; set prompt: "
        '"{{context}}" and completion: "{{reply}}", with the columns that are meant, or format: ',
    ),
    "several.jsonl": (
        lines({"instruction": "w1", "output": "w2", "text": "w1 w2", "messages": ASKED}),
        {},
        "data.train.0.format: {path} has the columns instruction, output, text, messages, which fit several formats; "
        "set format: messages or alpaca",
    ),
    "system.jsonl": (
        lines({"text": "w1"}),
        {"system": "w1"},
        "data.train.0.system: is not read: it belongs to conversations, and format text has none; leave it out",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_with_file_row_column_and_key(name, recipe, tmp_path, verb):
    content, source, line = WRONG[name]
    (tmp_path / name).write_text(content)
    _, err = verb("train" if name == "thinking.jsonl" else "validate", recipe(tmp_path / name, **source), expect=2)
    assert err.strip().removeprefix("error: ") == f"{tmp_path / name}: {line}"


@pytest.mark.parametrize("name", UNTOLD)
def test_columns_that_tell_no_format_or_several(name, recipe, tmp_path, verb):
    content, source, line = UNTOLD[name]
    (tmp_path / name).write_text(content)
    _, err = verb("validate", recipe(tmp_path / name, **source), expect=2)
    (said,) = err.strip().splitlines()
    assert line.format(path=tmp_path / name) in said


def told(tmp_path, rows, **source):
    (tmp_path / "rows.jsonl").write_text(lines(*rows))
    recipe = {
        "model": {"name_or_path": "m"},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")} | source]},
        "output_dir": "out",
    }
    return tell_formats(Recipe.model_validate(recipe))


@pytest.mark.parametrize(
    ("row", "source", "form"),
    [
        (GOOD | {"text": "w1", "messages": ASKED}, {}, "prompt_completion"),
        ({"question": "w1", "answer": "w2", "id": 3, "task": "a"}, {}, "gsm8k"),
        ({"question": "w1", "choices": {}, "answerKey": "A"}, {}, "arc"),
        ({"dialogue": ASKED, "messages": None}, {"columns": {"messages": "dialogue"}}, "messages"),
        ({"instruction": "w1", "output": "w2", "score": 3}, {}, "alpaca"),
    ],
)
def test_the_columns_of_the_first_rows_tell_a_format(row, source, form, tmp_path):
    found, (line,) = told(tmp_path, [row], **source)
    assert found.data.train[0].format == form
    assert line.startswith(f"rows.jsonl: format {form}, told by the columns ")


def test_sources_alike_share_a_line(tmp_path):
    rows = {"a": {"prompt": "w1", "completion": "w2"}, "b": {"prompt": "w3", "completion": "w4"}}
    rows |= {"c": {"question": "w1", "answer": "w2"}, "d": rows["a"]}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(lines(row))
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in rows]
    recipe = {"model": {"name_or_path": "m"}, "data": {"train": sources}, "output_dir": "out"}
    found = tell_formats(Recipe.model_validate(recipe))
    assert found.lines == [
        "a.jsonl and 2 more files: format prompt_completion, told by the columns prompt, completion",
        "c.jsonl: format gsm8k, told by the columns question, answer",
    ]


@pytest.mark.parametrize("source", [{"format": "gsm8k"}, {"prompt": "{a}"}, {"completion": "{a}"}])
def test_a_source_that_says_its_format_is_not_looked_into(source, tmp_path):
    found, said = told(tmp_path, [{"messages": ASKED}], **source)
    assert not said
    assert found.data.train[0].format == source.get("format", "prompt_completion")


@pytest.mark.parametrize("other", ["context", "label", "choices"])
def test_a_question_or_a_text_beside_another_column_tells_nothing(other, tmp_path):
    from remix_cli.errors import DataError

    for row in ({"question": "w1", "answer": "w2"}, {"text": "w1"}):
        with pytest.raises(DataError, match="which tell no format; set prompt"):
            told(tmp_path, [row | {other: "w3"}])


def test_a_run_keeps_the_format_that_was_told(recipe, tmp_path, verb):
    """What is evaluated and resumed later need not be told again."""
    (tmp_path / "rows.jsonl").write_text(lines(*[{"messages": ASKED}] * 8))
    path = recipe(tmp_path / "rows.jsonl")
    said = verb("train", path, "train.max_steps=1", "train.save_steps=null")[0]
    assert "rows.jsonl: format messages, told by the columns messages" in said
    stored = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert stored.data.train[0].format == "messages"
    assert stored.data.train[0].says_format
    verb("train", path, "train.max_steps=1", "train.save_steps=null", "--resume")


def test_sources_of_tasks_are_told_too(tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines({"messages": ASKED}))
    source = {"path": str(tmp_path / "rows.jsonl")}
    recipe = {
        "model": {"name_or_path": "m"},
        "data": {"train": [source]},
        "eval": {"tasks": [{"task": "nll", "source": source}, {"task": "nll", "source": {"path": "owner/name"}}]},
        "output_dir": "out",
    }
    found, said = tell_formats(Recipe.model_validate(recipe))
    assert [task.source.format for task in found.eval.tasks] == ["messages", "prompt_completion"]
    assert said == ["rows.jsonl: format messages, told by the columns messages"]  # one line for both
