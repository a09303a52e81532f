"""Recipes, data and base models that are wrong: rows R*, D* of docs/reliability.md."""

import json
import os
import random
import shutil
import time

import pytest
import torch
import yaml
from helpers.recipes import MINIMAL, problems, with_key, write
from helpers.tiny import recipe_text, write_recipe
from safetensors.torch import load_file

from remix_cli.errors import DataError, RecipeError
from remix_cli.recipe import Recipe, load_recipe
from remix_cli.recipe.schema import Source


def leaf_kinds() -> dict[str, str]:
    """Dotted key -> JSON schema type, for keys of a single scalar type."""
    schema = Recipe.model_json_schema()
    kinds = {}

    def walk(node, at):
        node = schema["$defs"][node["$ref"].split("/")[-1]] if "$ref" in node else node
        for name, field in node.get("properties", {}).items():
            key = f"{at}.{name}".removeprefix(".")
            inner = field.get("items", field)
            options = [inner, *inner.get("anyOf", []), *inner.get("allOf", [])]
            nested = [o for o in options if "$ref" in o]
            for option in nested:
                walk(option, key)
            types = {o["type"] for o in options if o.get("type") not in (None, "null")}
            if not nested and len(types) == 1 and field.get("type") != "array":
                kinds[key] = types.pop()
        return kinds

    return walk(schema, "")


KINDS = leaf_kinds()
WRONG = {
    "integer": [True, "2", 2.5, [1], {"a": 1}],
    "number": [True, "2", [1], {"a": 1}],
    "string": [3, 1.5, True, ["x"], {"a": 1}],
    "boolean": ["yes", 1, 0.0, [True]],
}


def test_every_scalar_key_of_the_schema_is_covered():
    assert len(KINDS) > 45
    assert {"adapter.rank": "integer", "train.learning_rate": "number", "output_dir": "string"}.items() <= KINDS.items()


@pytest.mark.parametrize("key", [k for k, kind in KINDS.items() if kind in WRONG])
def test_R3_a_value_of_another_type_is_refused(key, tmp_path):
    for value in WRONG[KINDS[key]]:
        found = problems(tmp_path, with_key(key, value))
        named = [line for line in found if key.split(".")[-1] in line]
        assert named, (value, found)


@pytest.mark.parametrize("key", [k for k, kind in KINDS.items() if kind in ("integer", "number")])
def test_R5_no_number_is_negative_infinite_or_none(key, tmp_path):
    for text in ("-1", ".nan", ".inf", "-.inf"):
        recipe = yaml.safe_dump(with_key(key, "NUMBER")).replace("NUMBER", text)
        assert any(key.split(".")[-1] in line for line in problems(tmp_path, recipe)), text


def test_R7_more_active_than_there_are(tmp_path):
    (line,) = problems(tmp_path, MINIMAL | {"adapter": {"pool_size": 3, "active": 4}})
    assert "k = 4" in line
    assert "n = 3" in line


def test_R8_a_target_that_matches_nothing_lists_what_there_is(verb, stage, tmp_path):
    model, rows, _ = stage
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(model, rows, tmp_path / "out"))
    _, err = verb("train", recipe, "adapter.target_modules=[gate_proj, nothing]", expect=2)
    assert "'nothing'; this model has: q_proj, k_proj" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.system", "module:os"])
def test_R11_no_yaml_tag_runs_code(tag, tmp_path):
    sentinel = tmp_path / "sentinel"
    problems(tmp_path, f"seed: !!python/{tag} ['{sentinel}']\n")
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "zero", "loop", "url"])
def test_R12_paths_that_are_no_files_are_refused_without_hanging(kind, verb, stage, tmp_path):
    bad = tmp_path / "bad.jsonl"
    if kind == "folder":
        bad.mkdir()
    elif kind == "fifo":
        os.mkfifo(bad)
    elif kind == "zero":
        bad.symlink_to("/dev/zero")
    elif kind == "loop":
        bad.symlink_to(bad)
    name = "https://user:secret@example.org/rows.jsonl" if kind == "url" else str(bad)
    begun = time.monotonic()
    verb("train", name, expect=2)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(stage[0], name, tmp_path / "out"))
    _, err = verb("train", recipe, expect=2)
    assert "data.train.0.path" in err
    assert "secret" not in err
    assert time.monotonic() - begun < 10
    assert not (tmp_path / "out").exists()


def test_R13_limits_that_do_not_fit_the_data(verb, stage, tmp_path):
    model, rows, _ = stage
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(model, rows, tmp_path / "out"))
    for wrong in ("train.max_steps=0", "train.gradient_accumulation_steps=0", "data.max_length=257"):
        assert wrong.split("=")[0] in verb("train", recipe, wrong, expect=2)[1]
    # A batch larger than the data is one short batch; saving later than the end still saves at the end.
    huge = ["train.per_device_train_batch_size=999", "train.max_steps=1", "train.save_steps=50"]
    verb("train", recipe, *huge)
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-000001"]


def broken_model(stage, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(stage[0], folder)
    change(folder)
    return write_recipe(tmp_path / "r.yaml", recipe_text(folder, stage[1], tmp_path / "out"))


def unlink(name):
    return lambda folder: (folder / name).unlink()


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "expect", "message"),
    [
        (shutil.rmtree, 2, "no such folder"),
        (unlink("config.json"), 2, "cannot be loaded"),
        (unlink("model.safetensors"), 2, "cannot be loaded"),
        (unlink("tokenizer.json"), 2, "cannot be loaded"),
        (pickled, 5, "pickled weights are not read"),
    ],
    ids=["nothing", "no config", "no weights", "no tokenizer", "pickle only"],
)
def test_R14_base_models_that_cannot_be_loaded(verb, stage, tmp_path, change, expect, message):
    recipe = broken_model(stage, tmp_path, change)
    _, err = verb("train", recipe, expect=expect)
    assert message in err
    assert "model.name_or_path" in err
    assert not (tmp_path / "out").exists()


def test_D11_a_tokenizer_larger_than_the_embedding(verb, stage, tmp_path):
    def grow(folder):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] |= {f"extra{i}": 64 + i for i in range(30)}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    _, err = verb("train", broken_model(stage, tmp_path, grow), expect=2)
    assert "the model embeds 64" in err
    assert not (tmp_path / "out").exists()


def test_A7_code_that_a_base_model_brings_along_is_not_run(verb, stage, tmp_path):
    def plant(folder):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')\n")
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
        (folder / "config.json").write_text(json.dumps(config))

    _, err = verb("train", broken_model(stage, tmp_path, plant), expect=2)
    assert "cannot be loaded" in err
    assert not (tmp_path / "sentinel").exists()


def test_A7_chat_templates_are_sandboxed(verb, stage, tmp_path):
    def plant(folder):
        escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        (folder / "chat_template.jinja").write_text(escape)

    _, err = verb("train", broken_model(stage, tmp_path, plant), expect=2)
    assert "template" in err


def rows_error(tmp_path, content, **source) -> str:
    from remix_cli.data.encode import load_examples

    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_examples([Source(path=str(path), **source)])
    (line,) = caught.value.problems
    assert str(path) in line
    assert len(line) < len(str(path)) + 220
    return line


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize("content", ["", "\n\n \n", "[]"])
def test_D1_no_rows(content, tmp_path):
    assert "no rows" in rows_error(tmp_path, content)


def test_D1_all_rows_filtered_says_why(verb, stage, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "w1 " * 60, "answer": "w2"}) + "\n")
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(stage[0], rows, tmp_path / "out"))
    _, err = verb("train", recipe, "data.validation_fraction=0.0", "train.eval_steps=null", expect=2)
    assert "no row has a supervised token within data.max_length = 32" in err


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"prompt": "a"}', "row 2: no column 'completion'; the row has prompt"),
        ('{"prompt": null, "completion": "b"}', "row 2: column 'prompt' should be text, is null"),
        ('{"prompt": ["a"], "completion": "b"}', "row 2: message 1: the role should be one of"),
        ('{"prompt": "a", "completion": {"b": 3}}', "row 2: column 'completion' should be text, is dict"),
        ('["a"]', "row 2: should be an object of columns, is list"),
        ('{"prompt": "a", "completion": " \\t"}', "row 2: column 'completion': the answer is blank"),
        ('{"prompt": "\\ud800", "completion": "b"}', "row 2: column 'prompt' holds a lone surrogate"),
    ],
    ids=["missing", "null", "list", "object", "not an object", "D7 blank", "D5 surrogate"],
)
def test_D2_D5_D7_a_bad_row_is_named_with_its_column(second, message, tmp_path):
    assert message in rows_error(tmp_path, GOOD + second + "\n")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"prompt": "a", "comp', "line 2: not JSON"),
        ('{"prompt": "a", "completion": "b"', "line 2: not JSON"),
        ('{"prompt": "a", "prompt": "c", "completion": "b"}', "line 2: key 'prompt' stands twice"),
        ('{"prompt": "a", "completion": NaN}', "row 2: column 'completion' should be text, is float"),
        ("{" * 100_000, "line 2: not JSON"),
        ("x" * 10_000, "line 2: not JSON"),
        ("9" * 5000, "line 2: not JSON that can be read"),
    ],
    ids=["broken", "cut off", "key twice", "NaN", "nested", "long", "digits"],
)
def test_D3_broken_json_is_named_by_its_line(second, message, tmp_path):
    assert message in rows_error(tmp_path, GOOD + second)


def test_D3_not_utf8(tmp_path):
    assert "line 2: not UTF-8" in rows_error(tmp_path, GOOD.encode() + b'{"prompt": "\xff"}\n')


def test_R_places_hold_no_nul(verb, stage, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], "a\0b"))
    assert "output_dir: holds a NUL" in verb("train", path, expect=2)[1]


def test_R_one_of_resume_and_overwrite(verb, stage, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    assert "give one of them" in verb("train", path, "--resume", "--overwrite", expect=2)[1]


def test_R_flags_of_generate_are_read(verb, finished):
    assert "--block: says" in verb("generate", finished, "w1 ?", "--block", 1, expect=2)[1]
    assert "the model reads at most 256" in verb("generate", finished, "w1 " * 300, expect=2)[1]


def test_D3_damaged_files_fail_as_data_errors_or_load(tmp_path):
    """500 random edits of a good file: never another exception."""
    from remix_cli.data.encode import load_examples

    draw = random.Random(0)
    good = (GOOD * 3).encode()
    path = tmp_path / "rows.jsonl"
    refused = 0
    for _ in range(500):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            load_examples([Source(path=str(path))])
        except DataError:
            refused += 1
    assert 200 < refused < 500


def test_D2_a_template_that_multiplies_a_long_text(tmp_path):
    long = json.dumps({"prompt": "w" * 1_000_000, "completion": "b"}) + "\n"
    assert "row 1: its text would have more than 50,000,000" in rows_error(tmp_path, long, prompt="{prompt}" * 5000)


def test_a_hub_message_is_not_cut_in_the_middle_of_an_address(monkeypatch):
    import datasets

    from remix_cli.data.sources import load_rows

    address = "https://hub.example/owner/name/resolve/" + "a" * 80

    def fails(*_, **__):
        raise ConnectionError(f"Couldn't reach the hub because {'of this and that ' * 7}see {address} for more")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError) as caught:
        load_rows(Source(path="owner/name"))
    (line,) = caught.value.problems
    assert line.endswith("that see ...")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError(f"see {address}")))
    with pytest.raises(DataError, match=address):
        load_rows(Source(path="owner/name"))


def test_D6_rows_in_train_and_validation(verb, stage, tmp_path):
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "out")
    recipe["data"]["validation"] = [{"path": str(rows), "format": "gsm8k", "limit": 6}]
    del recipe["data"]["validation_fraction"]
    path = write_recipe(tmp_path / "r.yaml", recipe)
    _, err = verb("train", path, expect=2)
    assert "data.validation: 6 of 6 rows are also in data.train" in err
    assert not (tmp_path / "out").exists()
    out, _ = verb("train", path, "data.allow_overlap=true", "train.max_steps=1")
    assert "6 of them also in train" in out


def test_D9_one_enormous_row_is_cut_and_counted(verb, stage, tmp_path):
    model, rows, _ = stage
    huge = tmp_path / "rows.jsonl"
    text = "w1 " * 300_000
    huge.write_text(json.dumps({"question": "w1 ?", "answer": text}) + "\n" + rows.read_text())
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(model, huge, tmp_path / "out"))
    out, _ = verb("train", recipe, "train.max_steps=1", "data.validation_fraction=0.0", "train.eval_steps=null")
    assert "1 cut at max_length" in out


def test_load_recipe_never_leaves_with_another_exception(tmp_path):
    """2,000 random edits of a complete recipe: it loads, or says what is wrong."""
    draw = random.Random(0)
    good = yaml.safe_dump(with_key("train.learning_rate", 1e-3)).encode()
    refused = 0
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / "recipe.yaml"
        path.write_bytes(data)
        try:
            load_recipe(path)
        except RecipeError as error:
            refused += len(error.problems) > 0
    assert refused > 500
    write(tmp_path, "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "eval={tasks: [{task: gsm8k, shots: 2, max_new_tokens: 8, shots_from: {path: none.jsonl}}]}",
            "tasks.0.shots_from.path: none.jsonl",
        ),
        (
            "eval={tasks: [{task: gsm8k, max_new_tokens: 256}]}",
            "max_new_tokens: 256 after a prompt, but the model",
        ),
        # 256 positions: the prompts are of eight tokens or so
        ("eval={tasks: [{task: gsm8k, max_new_tokens: 254}]}", "max_new_tokens: 254 after a prompt of "),
        ("data.validation_fraction=0.999", "data.validation_fraction: 0.999 holds out all 40 rows of "),
        ("adapter.target_modules=['(.|\\w|o)+[#!]']", "takes too long to match"),
        (f"adapter.target_modules=['{'(' * 3000}']", "is no regular expression that can be read"),
    ],
)
def test_R13_what_cannot_be_used_shows_before_training(override, message, verb, stage, tmp_path):
    model, rows, _ = stage
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(model, rows, tmp_path / "out"))
    begun = time.process_time()
    _, err = verb("validate", recipe, override, expect=2)
    assert len(err.splitlines()) == 1
    assert message in err
    assert time.process_time() - begun < 5


def test_R13_virtual_tokens_count_among_the_positions(verb, stage, tmp_path):
    model, rows, _ = stage
    recipe = recipe_text(model, rows, tmp_path / "out") | {"adapter": {"method": "prefix", "virtual_tokens": 20}}
    recipe["eval"] = {"tasks": [{"task": "gsm8k", "max_new_tokens": 235}]}
    del recipe["router"]
    path = write_recipe(tmp_path / "r.yaml", recipe)
    _, err = verb("validate", path, expect=2)
    assert "and 20 virtual tokens, but the model reads at most 256 tokens" in err
    _, err = verb("train", path, "train.eval_tasks_limit=4", expect=2)
    assert "and 20 virtual tokens, but the model reads at most 256 tokens" in err
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    verb("validate", path, "eval.tasks.0.max_new_tokens=200")
