"""Published shapes stand in for bases that are out of reach, and say what the bases themselves would."""

import json

import pytest
from helpers.tiny import recipe_text, write_recipe, write_tiny_model
from transformers import AutoConfig, AutoTokenizer

from remix_cli.models import KnownBase, known_base, out_of_reach, skeleton
from remix_cli.models.known_shapes import PUBLISHED
from remix_cli.recipe.schema import Model

# As the bases' own pages count them; tied embeddings once.
PARAMETERS = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
}
OTHER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 4096}


def base_of(name: str) -> KnownBase:
    found = known_base(Model(name_or_path=name))
    assert found is not None
    return found


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_shape_has_the_published_number_of_parameters(name):
    model = skeleton(base_of(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert all(p.is_meta for p in model.parameters())


def test_llama_31_turns_its_positions_as_published():
    rope = base_of("meta-llama/Llama-3.1-8B").config().rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("llama3", 500_000.0, 8.0)


def test_what_is_not_published_or_lies_here_has_no_known_shape():
    names = ("meta-llama/Llama-3.1-70B", "./Qwen/Qwen3-8B", "models/Qwen3-8B")
    assert [known_base(Model(name_or_path=name)) for name in names] == [None] * 3


def test_the_base_keeps_what_the_recipe_says_of_it():
    said = Model(name_or_path="Qwen/Qwen3-8B", dtype="float16", quantization="4bit")
    base = known_base(said)
    assert base is not None
    assert base.model_dump() == said.model_dump()


@pytest.fixture
def small(monkeypatch):
    """The shape of a small model under one of the ids, which validates in a moment."""
    name = "Qwen/Qwen3-1.7B"
    monkeypatch.setitem(PUBLISHED, name, PUBLISHED[name] | OTHER | {"num_attention_heads": 2, "vocab_size": 64})
    return name


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (OSError("You are trying to access a gated repo."), True),
        (ValueError("The checkpoint you are trying to load has model type `x`"), False),
        (None, False),
    ],
)
@pytest.mark.parametrize("missing", [AutoConfig, AutoTokenizer], ids=["config", "tokenizer"])
def test_out_of_reach_is_what_the_hub_refuses_and_not_what_cannot_be_read(missing, error, away, monkeypatch):
    def answer(**_):
        if error is not None:
            raise error

    for kind in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", answer if kind is missing else lambda **_: None)
    assert out_of_reach(Model(name_or_path="meta-llama/Llama-3.1-8B")) is away


def long_rows(path):
    row = {"question": "w1 " * 20, "answer": "w2 " * 90}  # longer than max_length, so cut to it
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"question": "w3"}) + "\n")
    return path


@pytest.mark.parametrize("changes", [[], ["model.quantization=4bit", "train.gradient_checkpointing=true"]])
def test_validate_says_of_the_shape_what_it_says_of_a_folder_with_that_config(small, changes, tmp_path, verb):
    """The folder has a config and a tokenizer, no weights; what `validate` reads of it is all it ever reads."""
    folder = write_tiny_model(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    AutoConfig.for_model(**PUBLISHED[small]).save_pretrained(folder)
    text = recipe_text(folder, long_rows(tmp_path / "rows.jsonl"), tmp_path / "out", data={"max_length": 48})
    text["data"] |= {"validation_fraction": 0.0}
    del text["train"]["eval_steps"]
    path = write_recipe(tmp_path / "recipe.yaml", text)
    arguments = [*changes, "--processes", 2, "--json"]
    at_hand = json.loads(verb("validate", path, *arguments)[0])
    assert at_hand["sources"][0]["longest"] == 48
    away = json.loads(verb("validate", path, f"model.name_or_path={small}", *arguments)[0])
    assert away["tokens_per_row"] == 48
    for key in ("parameters", "memory_gib", "rows_per_step", "passes", "estimator"):
        assert away[key] == at_hand[key]


def test_validate_says_that_it_went_by_the_shape_and_training_refuses_as_ever(small, tmp_path, verb):
    text = recipe_text(small, long_rows(tmp_path / "rows.jsonl"), tmp_path / "out")
    path = write_recipe(tmp_path / "recipe.yaml", text)
    out, _ = verb("validate", path)
    assert "base      shape known, weights not looked at" in out
    assert "rows      not looked at without a tokenizer: 32 tokens each (data.max_length)" in out
    assert "together" in out
    assert max(map(len, out.split("method")[0].splitlines())) <= 80
    for arguments in (["train", path], ["train", path, "--dry-run"]):
        _, err = verb(*arguments, expect=2)
        assert err.startswith(f"error: model.name_or_path: {small}: cannot be loaded: ")
    assert not (tmp_path / "out").exists()


def test_what_else_is_wrong_is_told_all_the_same(small, tmp_path, verb):
    text = recipe_text(small, tmp_path / "none.jsonl", tmp_path / "out", data={"max_length": 5000})
    text["adapter"]["target_modules"] = ["nothing_of_this_name"]
    _, err = verb("validate", write_recipe(tmp_path / "recipe.yaml", text), expect=2)
    assert "data.train.0.path" in err
    assert "adapter.target_modules: " in err
    assert "data.max_length: 5000, but the model reads at most 4096 tokens" in err


def test_an_id_without_a_known_shape_stays_an_error(tmp_path, verb):
    text = recipe_text("somebody/unheard-of", long_rows(tmp_path / "rows.jsonl"), tmp_path / "out")
    _, err = verb("validate", write_recipe(tmp_path / "recipe.yaml", text), expect=2)
    assert err.startswith("error: model.name_or_path: somebody/unheard-of: cannot be loaded: ")
