"""Every shape of rows in tests/data/shapes either trains, or one line says which key to set or what to take out."""

import csv
import json

import pytest
from helpers.common import ROOT
from helpers.tiny import TEMPLATE_WITH_TOOLS, recipe_text, write_recipe, write_tiny_model

SHAPES = ROOT / "tests" / "data" / "shapes"
# File -> what its source says besides its path.
TRAINED = {
    "prompt_completion.jsonl": {},
    "conversational_pair.jsonl": {},
    "messages.jsonl": {},
    "messages_system.jsonl": {},
    "messages_parts.jsonl": {},
    "messages_tools.jsonl": {},
    "messages_unanswered.jsonl": {},
    "messages_weight_of_turn.jsonl": {},
    "messages_other_column.jsonl": {"format": "messages", "columns": {"messages": "dialogue"}},
    "messages_list.json": {},
    "sharegpt.jsonl": {},
    "sharegpt_system.jsonl": {},
    "alpaca.jsonl": {},
    "alpaca_history.jsonl": {},
    "text.jsonl": {},
    "text.txt": {},
    "question_answer.jsonl": {},
    "multiple_choice.jsonl": {},
    "numbers.csv": {},
    "semicolons.csv": {"separator": ";"},
    "tabs.tsv": {},
    "numbers.jsonl.gz": {},
    "tasks_and_weights.jsonl": {},
    "own_columns.csv": {"prompt": "{problem}", "completion": "{result}"},
    "quoted.csv": {},
}
# File -> the part of its line that says what to do.
REFUSED = {
    "thinking.jsonl": "row 1: column 'messages': the chat template leaves out what message 2 (assistant) thinks "
    "(reasoning_content); use",
    "picture.jsonl": "row 1: column 'messages': message 1: content has a part of type 'image', and only text is read; "
    "take the row out",
    "no_answer.jsonl": "row 1: column 'messages' holds no message of the assistant's",
    "null.jsonl": "row 2: column 'completion' should be text, is null; name another column, or take the row out",
    "unknown.jsonl": 'has the columns a, b, which tell no format; set prompt: "{a}" and completion: "{b}"',
    "preferences.jsonl": "has the columns prompt, chosen, rejected, which tell no format; set prompt:",
    "unknown_role.jsonl": "row 1: column 'messages': message 1: the role should be one of system, developer, user, "
    "assistant, tool",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE_WITH_TOOLS)
    return folder


def recipe_of(model, folder, sources):
    text = recipe_text(model, SHAPES / "text.txt", folder / "out")
    text["data"] |= {"train": sources, "validation_fraction": 0.0}
    text["train"] = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return write_recipe(folder / "recipe.yaml", text)


def test_every_shape_is_tried():
    assert {file.name for file in SHAPES.iterdir()} == {*TRAINED, *REFUSED, "README.md"}
    assert len(TRAINED) >= 24


def test_shapes_train_side_by_side(model, tmp_path, verb):
    """All in one run; the summary of `validate` has a line for each."""
    sources = [{"path": str(SHAPES / name)} | said for name, said in TRAINED.items()]
    recipe = recipe_of(model, tmp_path, sources)
    shown = " ".join(verb("validate", recipe)[0].split())
    for name in TRAINED:
        assert f"{name} (" in shown
    verb("train", recipe)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rows = sum(2 if name in ("text.txt", "numbers.jsonl.gz") else 1 for name in TRAINED)
    assert metrics[-1]["step"] == -(-rows // 4)


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_in_one_line(name, model, tmp_path, verb):
    _, said = verb("validate", recipe_of(model, tmp_path, [{"path": str(SHAPES / name)}]), expect=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert name in line
    assert REFUSED[name] in line


def trained_and_scored(model, folder, verb, recipe):
    """The score of the recipe's one task. The recipe has at most 15 lines."""
    text = recipe.format(model=model, folder=folder)
    assert len(text.splitlines()) <= 15
    (folder / "recipe.yaml").write_text(text)
    verb("train", folder / "recipe.yaml")
    verb("eval", folder / "out")
    (result,) = json.loads((folder / "out" / "eval" / "adapter.json").read_text())["results"]
    return result


WORD_PROBLEMS = """\
model: {{name_or_path: {model}, dtype: float32}}
adapter: {{method: rslora, rank: 4}}
data:
  max_length: 64
  train: [{{path: {folder}/train.csv, prompt: "{{Body}} {{Question}}", completion: "{{Answer}}"}}]
train: {{learning_rate: 0.02, num_train_epochs: 20}}
eval:
  tasks:
    - task: exact_match
      max_new_tokens: 4
      source: {{path: {folder}/test.csv, prompt: "{{Body}} {{Question}}", completion: "{{Answer}}"}}
output_dir: {folder}/out
"""


def test_word_problems_from_a_csv_are_trained_and_scored(model, tmp_path, verb):
    """Columns as SVAMP has them, numbers for answers."""
    for name, count in (("train.csv", 32), ("test.csv", 8)):
        with (tmp_path / name).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["ID", "Body", "Question", "Answer"])
            rows.writerows([i, f"w{i % 4} w9", "w8 ?", 7] for i in range(count))
    result = trained_and_scored(model, tmp_path, verb, WORD_PROBLEMS)
    assert result["task"] == "exact_match"
    assert result["count"] == 8
    assert result["scores"]["accuracy"] == 1.0


SCIENCE = """\
model: {{name_or_path: {model}, dtype: float32}}
adapter: {{method: rslora, rank: 4}}
data:
  max_length: 64
  train: [{{path: {folder}/train.jsonl, prompt: "{{question}}", completion: "{{right}}"}}]
train: {{learning_rate: 0.02, num_train_epochs: 20}}
eval:
  tasks:
    - task: choice
      options: choices
      answer: answer
      source: {{path: {folder}/test.jsonl, prompt: "{{question}}", completion: "{{right}}"}}
output_dir: {folder}/out
"""


def test_questions_with_options_from_json_are_trained_and_scored(model, tmp_path, verb):
    """A question, its options and the right one's number, as OpenBookQA has them."""
    for name, count in (("train.jsonl", 32), ("test.jsonl", 8)):
        rows = []
        for i in range(count):
            rows.append({"question": f"w{i % 4} ?", "choices": ["w5", "w6"], "answer": 1, "right": "w6"})
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = trained_and_scored(model, tmp_path, verb, SCIENCE)
    assert result["task"] == "choice"
    assert result["scores"]["accuracy"] == 1.0
