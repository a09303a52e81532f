"""The least recipe there is, changed key by key, and what loading it complains of."""

from pathlib import Path

import pytest
import yaml

from remix_cli.errors import RecipeError
from remix_cli.recipe import load_recipe

MINIMAL = {"model": {"name_or_path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}, "output_dir": "o"}


LISTS = ("data.train", "data.validation", "eval.tasks")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def with_key(dotted: str, value) -> dict:
    """The minimal recipe with one more key; `data.train.path` means the path of the first entry."""
    recipe = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = dotted.split(".")
    place = recipe
    for depth, part in enumerate(parents, start=1):
        is_list = ".".join(parents[:depth]) in LISTS
        place = place.setdefault(part, [{}] if is_list else {})
        place = place[0] if is_list else place
    place[last] = value
    return recipe


def problems(tmp_path, recipe, *overrides) -> list[str]:
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe)
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return caught.value.problems
