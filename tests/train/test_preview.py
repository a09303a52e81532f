"""`remix validate` shows what each source gives before anything is trained."""

import json

import pytest
from helpers.tiny import recipe_text, write_recipe

from remix_cli.data.batches import collate
from remix_cli.data.splits import load_data
from remix_cli.models.loading import load_tokenizer
from remix_cli.recipe import load_recipe


def test_each_source_is_counted_and_a_row_of_it_shown(stage, tmp_path, verb):
    model, rows, _ = stage
    lines = [json.dumps({"ask": "w1 w2", "reply": "w3"})] * 3 + [json.dumps({"ask": "w1 " * 40, "reply": "w4"})]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    recipe = recipe_text(model, rows, tmp_path / "out")
    other = {"path": str(tmp_path / "other.jsonl"), "prompt": "{ask}", "completion": "{reply}"}
    del recipe["train"]["eval_steps"]
    recipe["data"] |= {"train": [recipe["data"]["train"][0], other], "validation_fraction": 0.0}
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    found = json.loads(verb("validate", path, "--json")[0])
    first, second = found["sources"]
    assert (first["name"], first["rows"], first["dropped"]) == ("rows.jsonl", 40, 0)
    assert second["rows"] == 3, "the fourth loses what is learnt at max_length"
    assert (second["conversations"], second["repeated"], second["dropped"]) == (4, 2, 1)
    said = " ".join(verb("validate", path)[0].split())
    assert "other.jsonl (prompt_completion): 3 rows, 6 supervised tokens, longest 6, 2 said before, 1 dropped" in said
    assert "<bot>«w3 <eos>»" in said
    assert said.index("rows.jsonl (gsm8k): 40 rows") < said.index("other.jsonl (prompt_completion): 3 rows")

    assert 0 < found["padding"] < 0.5


@pytest.mark.parametrize(("fraction", "held"), [(0.05, 0), (0.2, 2), (0.3, 3)])
def test_a_source_of_which_hardly_anything_is_held_out_is_remarked_on(fraction, held, stage, tmp_path, verb):
    model, rows, _ = stage
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:9]))
    recipe = recipe_text(model, rows, tmp_path / "out")
    recipe["data"] |= {"train": [*recipe["data"]["train"], {"path": str(few)}], "validation_fraction": fraction}
    said = " ".join(verb("validate", write_recipe(tmp_path / "recipe.yaml", recipe))[0].split())
    assert f"{held} held out" in said
    assert (f"{held} of its rows held out, too few to say how it fares by itself" in said) == (held < 3)
    own = {"data": recipe["data"] | {"validation": [{"path": str(few), "format": "gsm8k"}], "allow_overlap": True}}
    del own["data"]["validation_fraction"]
    said = " ".join(verb("validate", write_recipe(tmp_path / "recipe.yaml", recipe | own))[0].split())
    assert "of its rows held out" not in said


def test_padding_is_what_fills_micro_batches_to_their_longest_row(stage, tmp_path, verb):
    recipe = recipe_text(*stage[:2], tmp_path / "out", train={"per_device_train_batch_size": 1})
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    loaded = load_recipe(path)
    train = load_data(loaded, load_tokenizer(loaded.model)).train
    padded = sum(collate([row]).mask.numel() for row in train.rows)
    found = json.loads(verb("validate", path, "--json")[0])
    assert found["padding"] == pytest.approx(1 - train.lengths.sum() / padded)
