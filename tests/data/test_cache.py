"""Encoded rows on disk: the same rows, never stale, whole or not there."""

import json
import multiprocessing
import os
import time

import numpy as np
import pytest
from helpers.runs import outcome, run, small
from helpers.tiny import recipe_text, write_rows
from transformers import PreTrainedTokenizerFast

from remix_cli.data import cache
from remix_cli.data.encode import Encoder
from remix_cli.data.formats.registry import FORMATS, FormatFacts
from remix_cli.data.splits import load_data
from remix_cli.errors import DataError
from remix_cli.models import load_tokenizer
from remix_cli.recipe import Recipe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where everything is kept, from the first token on."""
    monkeypatch.setenv("REMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "KEPT", 1)
    monkeypatch.setattr(cache, "WAIT", 0.01)
    return tmp_path / "cache" / "rows"


@pytest.fixture
def recipe(stage, tmp_path):
    return recipe_text(stage[0], write_rows(tmp_path / "rows.jsonl", 30), tmp_path / "out")


def load(recipe, change=lambda tokenizer: None):
    checked = Recipe.model_validate(recipe)
    tokenizer = load_tokenizer(checked.model)
    change(tokenizer)
    return load_data(checked, tokenizer)


def told(data):
    """Everything that training sees of the rows."""
    rows = [(row.input_ids.tolist(), row.supervised.tolist(), row.task, row.weight) for row in data.train.rows]
    held = [(row.input_ids.tolist(), row.supervised.tolist(), row.task) for row in data.validation.rows]
    numbers = data.plan.counts, data.plan.lengths.tolist(), data.train.target_counts.tolist()
    return rows, held, numbers, data.train.describe(), data.validation.describe(), data.overlap, data.held_out


@pytest.fixture
def from_disk(monkeypatch):
    """Context: training rows are not encoded."""

    def never(self, examples, *, to_train=False):
        assert not to_train, "the rows were to be found on disk"
        return each(self, examples)

    each = Encoder.each

    def begin():
        monkeypatch.setattr(Encoder, "each", never)

    return begin


def test_rows_are_found_again_as_they_were_encoded(folder, recipe, from_disk, monkeypatch):
    monkeypatch.setenv("REMIX_CACHE", "off")
    without = told(load(recipe))
    monkeypatch.setenv("REMIX_CACHE", str(folder.parent))
    assert told(load(recipe)) == without
    assert len(list(folder.iterdir())) == 1
    from_disk()
    found = load(recipe)
    assert told(found) == without
    tokens = found.train.rows.packs[0].columns["tokens"]
    assert isinstance(tokens.base, np.memmap)
    assert folder.stat().st_mode & 0o777 == 0o700, "others need not read what one trains on"


def test_so_are_conversations_that_became_several_rows_or_none(folder, recipe, from_disk):
    """A template that shows an earlier turn otherwise once later ones follow."""
    turns = [{"role": role, "content": f"w{i}"} for i, role in enumerate(("user", "assistant") * 2)]
    long = [{"role": "user", "content": "w1 " * 40}, turns[1]]
    path = recipe["data"]["train"][0]["path"]
    with open(path, "w") as file:
        file.writelines(json.dumps({"messages": one}) + "\n" for one in [turns, long, turns[:2]] * 5)
    source = {"path": path, "format": "messages"}
    recipe["data"]["train"] = [source | {"task": "one"}, source]
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<bot> {{ m.content }} "
        "{% if loop.last %}<eos>{% endif %}{% else %}<user> {{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<bot> {% endif %}"
    )

    def change(tokenizer):
        tokenizer.chat_template = template

    first = load(recipe, change)
    assert first.train.split
    assert first.train.dropped
    assert len(first.train.rows) > len(first.sources[0].rows) > 0
    from_disk()
    assert told(load(recipe, change)) == told(first)


def test_a_run_from_disk_ends_with_the_same_bits(stage, tmp_path, monkeypatch, from_disk):
    ends = []
    for name in ("without", "first", "second"):
        if name == "first":
            monkeypatch.setenv("REMIX_CACHE", str(tmp_path / "cache"))
            monkeypatch.setattr(cache, "KEPT", 1)
        if name == "second":
            from_disk()
        (tmp_path / name).mkdir()
        run(small(stage, tmp_path / name, train={"max_steps": 6}))
        ends.append(outcome(tmp_path / name / "out"))
    assert ends[0] == ends[1] == ends[2]


def _same_size_and_time(path):
    before = path.stat()
    path.write_text(path.read_text().replace("w1 ", "w2 ", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def _another_eos(tokenizer):
    tokenizer.eos_token = "w39"


def _another_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<user>", "w39")


def _lower_case(tokenizer):
    from tokenizers.normalizers import Lowercase

    tokenizer.backend_tokenizer.normalizer = Lowercase()


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: recipe["data"].update(max_length=16),
        lambda recipe: recipe["data"].update(use_chat_template=False),
        lambda recipe: recipe["data"].update(allow_special_tokens=True),
        lambda recipe: recipe["data"].update(chat_template_kwargs={"mood": "kind"}),
        lambda recipe: recipe["data"]["train"][0].update(system="w3"),
        lambda recipe: recipe["data"]["train"][0].update(task="other"),
        lambda recipe: recipe["data"]["train"][0].update(limit=29),
        _another_eos,
        _another_template,
        _lower_case,
        _same_size_and_time,
    ],
)
def test_what_rows_depend_on_makes_them_others(folder, recipe, tmp_path, change):
    load(recipe)
    of_tokenizer = change in (_another_eos, _another_template, _lower_case)
    if change is _same_size_and_time:
        change(tmp_path / "rows.jsonl")
    elif not of_tokenizer:
        change(recipe)
    load(recipe, change if of_tokenizer else lambda tokenizer: None)
    assert len(list(folder.iterdir())) == 2


def test_our_own_code_and_versions_make_them_others(folder, recipe, monkeypatch):
    load(recipe)
    monkeypatch.setattr(cache, "_hash_of_code", lambda: "another")
    load(recipe)
    monkeypatch.setattr(cache, "version", lambda name: "0.0")
    load(recipe)
    assert len(list(folder.iterdir())) == 3


def test_a_template_that_writes_the_date_has_other_rows_tomorrow(folder, recipe, monkeypatch):
    class Tomorrow(cache.date):
        @classmethod
        def today(cls):
            return cls(2100, 1, 1)

    def dated(tokenizer):
        tokenizer.chat_template = "{% set today = strftime_now('%d') %}" + tokenizer.chat_template

    for made in (2, 3):
        load(recipe)
        load(recipe, dated)
        assert len(list(folder.iterdir())) == made
        monkeypatch.setattr(cache, "date", Tomorrow)


def test_what_only_chooses_among_rows_leaves_them_as_they_are(folder, recipe, tmp_path, from_disk):
    load(recipe)
    from_disk()
    recipe |= {"seed": 5, "train": recipe["train"] | {"max_steps": 9}}
    recipe["data"] |= {"validation_fraction": 0.5, "validation_limit": 3, "split_seed": 4}
    (tmp_path / "moved").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved" / "rows.jsonl")
    recipe["data"]["train"][0] |= {"path": str(tmp_path / "moved" / "rows.jsonl"), "weight": 2.0}
    assert len(load(recipe).validation.rows) == 3


def _cut(folder):
    with (folder / "tokens").open("r+b") as file:
        file.truncate(40)


def _flip(folder):
    content = bytearray((folder / "learnt").read_bytes())
    content[7] ^= 1
    (folder / "learnt").write_bytes(content)


def _forge(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"task_names": ["other"]}))


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _flip,
        _forge,
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "ends").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
    ],
)
def test_M3_what_is_damaged_is_made_anew(folder, recipe, damage, from_disk):
    expected = told(load(recipe))
    (kept,) = folder.iterdir()
    damage(kept)
    assert told(load(recipe)) == expected
    from_disk()
    assert told(load(recipe)) == expected


def test_few_rows_are_not_kept(tmp_path, recipe, monkeypatch):
    monkeypatch.setenv("REMIX_CACHE", str(tmp_path / "cache"))
    assert load(recipe).train.rows
    assert not (tmp_path / "cache").exists()


def test_where_nothing_can_be_written_rows_are_encoded_all_the_same(folder, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("REMIX_CACHE", str(tmp_path / "rows.jsonl"))  # a file
    assert load(recipe).train.rows


def test_rows_whose_making_cannot_be_told_are_not_kept(folder, recipe, monkeypatch):
    class Own(PreTrainedTokenizerFast):
        pass

    load(recipe, lambda tokenizer: setattr(tokenizer, "__class__", Own))
    monkeypatch.setitem(FORMATS, "gsm8k", FormatFacts("mine:read"))
    monkeypatch.setattr("remix_cli.data.formats.base.reader_of", lambda name: _read)
    load(recipe)
    assert not folder.exists()


def _read(row, source):
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def test_a_file_that_changes_while_it_is_read_is_told(folder, recipe, tmp_path, monkeypatch):
    def changes(*arguments):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "w1", "answer": "w2"}) + "\n")
        flush(*arguments)

    flush = cache.Packer.close
    monkeypatch.setattr(cache.Packer, "close", changes)
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read; start again"):
        load(recipe)
    assert list(folder.iterdir()) == []


def test_M3_processes_that_need_the_same_rows_encode_them_once(folder, recipe, tmp_path, monkeypatch):
    def slowly(*arguments):
        with (tmp_path / "written").open("a") as file:
            file.write("once\n")
        time.sleep(0.3)
        write(*arguments)

    write = cache._write_manifest
    monkeypatch.setattr(cache, "_write_manifest", slowly)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(3) as pool:
        found = pool.map(_load_and_tell, [recipe] * 3)
    assert found[0] == found[1] == found[2]
    assert (tmp_path / "written").read_text() == "once\n"
    assert len(list(folder.iterdir())) == 1


def _load_and_tell(recipe):
    return told(load(recipe))
