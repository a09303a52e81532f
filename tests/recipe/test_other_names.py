"""A key of another tool is answered by the key that does the same here."""

import pytest
import yaml
from helpers.recipes import MINIMAL, problems, with_key, write

from remix_cli.recipe import load_recipe
from remix_cli.recipe.loader import all_keys
from remix_cli.recipe.other_names import ANSWERS, Here

KEYS = all_keys()


@pytest.mark.parametrize("name", ANSWERS)
def test_a_key_of_another_tool_is_answered_in_one_line(name, tmp_path):
    (line,) = problems(tmp_path, with_key(f"train.{name}", 1))
    assert f"train.{name}: unknown key; {ANSWERS[name]}" in line


@pytest.mark.parametrize("answer", [a for a in dict.fromkeys(ANSWERS.values()) if isinstance(a, Here)], ids=str)
def test_what_an_answer_names_is_there_and_takes_the_value_it_names(answer, tmp_path):
    key, _, value = answer.key.partition(": ")
    assert key in KEYS
    if value:
        load_recipe(write(tmp_path, yaml.safe_dump(with_key(key, yaml.safe_load(value)))))


def test_keys_in_sentences_are_there_too():
    for answer in ANSWERS.values():
        words = str(answer).replace(",", " ").replace(";", " ").replace(":", " ").split()
        dotted = [w for w in words if w.split(".")[0] in ("model", "adapter", "router", "data", "train") and "." in w]
        assert set(dotted) <= set(KEYS), answer


def test_the_nearest_key_is_for_names_that_nobody_has(tmp_path):
    (line,) = problems(tmp_path, MINIMAL | {"lora_alpah": 16})
    assert "adapter.omega" not in line
    (line,) = problems(tmp_path, MINIMAL, "r=16")
    assert line.startswith("override: r: unknown key; here it is adapter.rank")
