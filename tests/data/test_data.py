"""Formats, supervision masks, and the plan of batches."""

import gc
import json
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from helpers.tiny import CHAT, WORDS, write_tiny_model

from remix_cli.data.batches import Plan, collate, micro_batches, starts_by_tokens
from remix_cli.data.encode import Encoder, load_examples
from remix_cli.data.formats import Example, RowError, to_example
from remix_cli.data.rows import EncodedRow
from remix_cli.data.sources import load_rows
from remix_cli.errors import DataError
from remix_cli.models import load_tokenizer
from remix_cli.recipe.schema import Model, Source


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    return load_tokenizer(Model(name_or_path=str(folder)))


def talk(*turns):
    roles = ("user", "assistant")
    return Example(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns)), "t")


def words(ids):
    return [WORDS[i] for i in ids]


def test_chat_supervises_every_answer_and_its_end(tokenizer):
    ids, supervised = Encoder(tokenizer, 64, None).encode(talk("w1 ?", "w2", "w3", "w4 w5"))
    learnt = [w for w, s in zip(words(ids), supervised, strict=True) if s]
    assert words(ids) == ["<user>", "w1", "?", "<bot>", "w2", "<eos>", "<user>", "w3", "<bot>", "w4", "w5", "<eos>"]
    assert learnt == ["w2", "<eos>", "w4", "w5", "<eos>"]


@pytest.mark.parametrize("chat", [None, False])
def test_what_is_learnt_follows_exactly_what_generation_is_given(tokenizer, chat):
    encoder = Encoder(tokenizer, 64, chat)
    for example in (talk("w1 ?", "w2"), talk("w1 ?", "w2", "w3", "w4 w5")):
        prompt, (ids, supervised) = encoder.prompt_ids(example), encoder.encode(example)
        assert ids[: len(prompt)] == prompt
        assert supervised[len(prompt) :] == [True] * (len(ids) - len(prompt))


def test_what_a_template_puts_after_an_end_token_is_kept_but_not_learnt(tokenizer, monkeypatch):
    """As ChatML's line break between turns."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT.replace("<eos>", "<eos> ."))
    ids, supervised = Encoder(tokenizer, 64, None).encode(talk("w1", "w2", "w3", "w4"))
    assert words(ids) == ["<user>", "w1", "<bot>", "w2", "<eos>", ".", "<user>", "w3", "<bot>", "w4", "<eos>"]
    assert [w for w, s in zip(words(ids), supervised, strict=True) if s] == ["w2", "<eos>", "w4", "<eos>"]


def test_a_template_that_refuses_a_conversation_is_a_data_error(tokenizer):
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(DataError, match=r"conversation 1: the chat template refuses.*no system role"):
            Encoder(tokenizer, 64, None).encode_rows([talk("w1", "w2")])
    finally:
        tokenizer.chat_template = before


def test_a_folder_never_gives_another_splits_rows(tmp_path):
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        (tmp_path / name).write_text(json.dumps(GOOD["prompt_completion"]) + "\n")
    with pytest.raises(DataError, match="no file named train; it holds gsm8k_test"):
        load_examples([Source(path=str(tmp_path))])
    (tmp_path / "train-00000.jsonl").write_text(json.dumps(GOOD["prompt_completion"]) + "\n")
    with pytest.raises(DataError, match=r"train-00000\.jsonl is the split train, but what gsm8k_train\.jsonl is for"):
        load_examples([Source(path=str(tmp_path))])
    (tmp_path / "gsm8k_train.jsonl").rename(tmp_path / "train-00001.jsonl")
    assert load_examples([Source(path=str(tmp_path))])[1] == [2]


@pytest.mark.parametrize("other", ["train_2.jsonl", "more.jsonl", "b.JSONL"])
def test_a_folders_files_are_all_read_or_named(tmp_path, other):
    for name in ("train.jsonl", other):
        (tmp_path / name).write_text(json.dumps(GOOD["prompt_completion"]) + "\n")
    with pytest.raises(DataError, match=re.escape(other)):
        load_examples([Source(path=str(tmp_path))])


def test_files_in_sub_folders_are_not_left_out_in_silence(tmp_path):
    row = json.dumps(GOOD["prompt_completion"]) + "\n"
    (tmp_path / "a.jsonl").write_text(row)
    for hidden in (".cache", ".git/x"):
        (tmp_path / hidden).mkdir(parents=True)
        (tmp_path / hidden / "b.jsonl").write_text(row)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("no data")
    assert load_examples([Source(path=str(tmp_path))])[1] == [1]
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "deep" / "b.JSONL").write_text(row)
    with pytest.raises(DataError, match=r"more/deep/b\.JSONL lies in a sub-folder, and those are not read"):
        load_examples([Source(path=str(tmp_path))])


def test_a_text_of_millions_of_characters_is_refused_before_it_is_tokenised(tokenizer, monkeypatch):
    encoder = Encoder(tokenizer, 8, None)
    assert encoder.encode_rows([talk("w1", "w2 " * 300_000)]).truncated == 1
    monkeypatch.setattr(encoder, "_ids", None)
    with pytest.raises(
        DataError, match=r"conversation 1: its text has 1,050,002 characters, data\.max_length = 8 allows"
    ):
        encoder.encode_rows([talk("w1", "w2 " * 350_000)])


def test_csv_cells_are_text_under_their_own_names(tmp_path):
    """A table library read the first of three cells under two names as a row's number, and shifted the others."""
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\n"a, b",007\n\nNA,"two\nlines"\n', encoding="utf-8-sig")
    rows = load_rows(Source(path=str(file)))
    assert rows == [{"prompt": "a, b", "completion": "007"}, {"prompt": "NA", "completion": "two\nlines"}]
    for text, problem in {
        "prompt,completion\na,b\na,b,c\n": "line 3: 3 cells under 2 names",
        "prompt,completion\na\n": "line 2: 1 cells under 2 names",
        "prompt,prompt,completion\na,b,c\n": "column 'prompt' stands twice",
        'prompt,completion\na,"b\n': "not CSV",
    }.items():
        file.write_text(text)
        with pytest.raises(DataError, match=problem):
            load_rows(Source(path=str(file)))


@pytest.mark.parametrize("labels", [["A", "A"], ["B"]])
def test_arc_options_can_be_told_apart(labels):
    row = GOOD["arc"] | {"choices": {"text": ["yes", "no"][: len(labels)], "label": labels}, "answerKey": labels[0]}
    with pytest.raises(RowError, match="two options or more, each with its own label"):
        to_example(row, Source(path="x.jsonl", format="arc"))


def test_plain_text_ends_with_the_end_token(tokenizer):
    ids, supervised = Encoder(tokenizer, 64, False).encode(talk("w1 ?", "w2"))
    assert words(ids) == ["w1", "?", "w2", "<eos>"]
    assert supervised == [False, False, True, True]


def test_the_prompt_is_what_generation_starts_from(tokenizer):
    encoder = Encoder(tokenizer, 64, None)
    example = talk("w1 ?", "w2")
    prompt = encoder.prompt_ids(example)
    assert words(prompt) == ["<user>", "w1", "?", "<bot>"]
    assert encoder.encode(example)[0][: len(prompt)] == prompt


def test_D8_truncation_is_counted_and_never_leaves_an_unsupervised_row(tokenizer):
    encoded = Encoder(tokenizer, 8, None).encode_rows(
        [talk("w1", "w2"), talk("w1 w1 w1", "w2 w2 w2 w2"), talk("w1 " * 9, "w2")]
    )
    assert (len(encoded.rows), encoded.truncated, encoded.dropped) == (2, 1, 1)
    assert all(row.supervised[1:].any() for row in encoded.rows)


def test_end_token_is_a_target_even_when_padding_looks_the_same(tokenizer):
    """pad = eos in this tokenizer: the mask, not the token, says what is learnt."""
    rows = Encoder(tokenizer, 64, None).encode_rows([talk("w1", "w2"), talk("w1 w3 w3 w3", "w2 w4")]).rows
    batch = collate(rows)
    assert words(batch.targets.tolist()) == ["w2", "<eos>", "w2", "w4", "<eos>"]
    predicted_from = batch.input_ids.flatten()[batch.positions].tolist()
    assert words(predicted_from) == ["<bot>", "w2", "<bot>", "w2", "w4"]
    assert batch.mask.sum(-1).tolist() == [len(r.input_ids) for r in rows]


GOOD = {
    "gsm8k": {"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"},
    "arc": {"question": "Up?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "B"},
    "codealpaca": {"instruction": "Add.", "input": "1, 2", "output": "3"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


@pytest.mark.parametrize("form", GOOD)
def test_formats(form):
    example = to_example(GOOD[form], Source(path="x.jsonl", format=form))
    prompt, answer = example.messages[0]["content"], example.messages[-1]["content"]
    expected = {
        "gsm8k": ("2 + 2?", "It is 4.\n#### 4"),
        "arc": ("Up?\nA. yes\nB. no\nAnswer with the letter of the right option.", "B"),
        "codealpaca": ("Add.\n\n1, 2", "3"),
        "prompt_completion": ("a", "b"),
        "messages": ("a", "b"),
    }
    assert (prompt, answer) == expected[form]


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("gsm8k", {"answer": None}, "should be text, is null; name another column"),
        ("gsm8k", {"question": ["a"]}, "should be text, is list"),
        ("gsm8k", {"question": float("nan")}, "should be text, is float"),
        ("gsm8k", {"answer": " "}, "blank"),
        ("gsm8k", {"question": "\ud800"}, "surrogate"),
        ("arc", {"answerKey": "Z"}, "not among"),
        ("messages", {"messages": []}, "list of"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant's"),
        ("messages", {"messages": [{"role": "robot", "content": "a"}]}, "^column 'messages': message 1: the role"),
        ("messages", {"messages": "a"}, "list of {role, content}, is str"),
        ("messages", {"messages": None}, "list of {role, content}, is null"),
        ("arc", {"choices": {"text": "ab", "label": "AB"}}, "lists 'text' and 'label'"),
        ("codealpaca", {"input": {"a": 3}}, "column 'input' should be text, is dict"),
    ],
)
def test_bad_rows_say_what_is_wrong(form, change, message):
    with pytest.raises(RowError, match=message):
        to_example(GOOD[form] | change, Source(path="x.jsonl", format=form))


def calling(**changes):
    user = {"role": "user", "content": "Weather in Rome?"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}
    result = {"role": "tool", "content": "rain"}
    return [user, call | changes, result, {"role": "assistant", "content": "It rains."}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": calling(tool_calls=None)}, r"the answer is blank \(message 2\)"),
        ({"messages": calling(tool_calls=[], content=None)}, "message 2: column 'content' should be text, is null"),
        ({"messages": calling(tool_calls={"name": "weather"})}, "message 2: 'tool_calls' should be a list, is dict"),
        ({"messages": calling(tool_calls=[{"id": "1"}])}, r"message 2: 'tool_calls' should hold \{function"),
        (
            {"messages": calling(tool_calls=[{"name": "weather", "arguments": "{"}])},
            "the arguments.*be JSON",
        ),
        ({"messages": calling(tool_calls=[{"name": "weather", "arguments": "3"}])}, "should be an object, are int"),
        (
            {"messages": calling(function_call={"name": "weather"})},
            "is not read; write it as tool_calls",
        ),
        ({"messages": calling(weight=2)}, "message 2: 'weight' is 2"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "belongs to the role assistant"),
        ({"messages": calling(content=[{"type": "image"}])}, "message 2: content has a part of type 'image'"),
        ({"messages": [m | {"weight": 0} for m in GOOD["messages"]["messages"][1:]]}, "every message .* has weight 0"),
        (GOOD["messages"] | {"tools": [{"type": "function"}]}, "column 'tools' should be a list of functions"),
        (GOOD["messages"] | {"tools": "weather"}, "column 'tools' should be JSON"),
        (GOOD["messages"] | {"system": "Be brief."}, "column 'system' is not read.* the first message"),
        ({"conversation": []}, "no column 'messages'; the row has conversation"),
    ],
)
def test_what_is_said_beside_role_and_content_is_not_lost(row, message):
    """Tool calls above all: an empty assistant turn would be learnt instead."""
    with pytest.raises(RowError, match=message):
        to_example(row, Source(path="x.jsonl", format="messages"))


def test_columns_that_a_table_filled_in_say_nothing():
    row = {"messages": [m | {"tool_calls": None, "name": None, "parts": []} for m in GOOD["messages"]["messages"]]}
    assert to_example(row | {"tools": None, "id": 3}, Source(path="x.jsonl", format="messages")).messages


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT.replace("<user> {{ m.content }}", "<user>"), r"leaves out what message 1 \(user\) says"),
        (CHAT.replace("<bot> {{ m.content }}", "<bot>"), r"leaves out what message 2 \(assistant\) says"),
        (CHAT.replace("m.content }} <eos>", "m.content.split('w1')[-1] }} <eos>"), r"leaves out what message 2"),
        (CHAT.replace("{% else %}", "{% elif m.role == 'user' and loop.first %}"), r"leaves out what message 3 \(user"),
    ],
)
def test_a_template_that_drops_what_is_said_is_refused(tokenizer, template, message, monkeypatch):
    """Short texts too, which also stand in the scaffolding."""
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(RowError, match=message):
        Encoder(tokenizer, 64, None).encode(talk("bot", "w1 . w2", "user", "w1 . eos"))


def test_a_template_that_drops_a_role_is_refused(tokenizer, monkeypatch):
    template = CHAT.replace("{% else %}", "{% elif m.role == 'user' %}")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    system = Example(({"role": "system", "content": "w1"}, *talk("w1 w2", "w3").messages), "t")
    with pytest.raises(RowError, match=r"leaves out what message 1 \(system\) says"):
        Encoder(tokenizer, 64, None).encode(system)
    assert Encoder(tokenizer, 64, None).encode(talk("w1", "w2"))


def test_templates_may_trim_and_write_json(tokenizer, monkeypatch):
    template = CHAT.replace("<user> {{ m.content }}", "<user> {{ m.content | trim | tojson }}")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert Encoder(tokenizer, 64, None).encode(talk('  w1 "w2"\nw3 ', "w2"))


LONG = "{% set s = 'a' * 1000000 %}"
GREEDY = {
    "folded constant": "{{ 'a' * 5000000000 }}",
    "of the data": "{{ messages[0].content * 900000000 }}",
    "list": "{{ ([1] * 900000000) | length }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "format": "{{ '{:>5000000000}'.format(1) }}",
    "printf": "{{ '%5000000000d' % 1 }}",
    "filter": "{{ 'a' | center(5000000000) }}",
    "replace": LONG + "{{ s.replace('a', s) }}",
    "JSON": "{{ messages | tojson(indent=1000000000) }}",
}
SLOW = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one call": "{{ ([[1] * 1000] * 20000) | sum(start=[]) | length }}",  # of C, which no signal reaches
}


@pytest.mark.parametrize("bomb", [*GREEDY, *SLOW])
def test_a_chat_template_has_a_time_and_a_memory(tokenizer, bomb, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", (GREEDY | SLOW)[bomb])
    begun = time.monotonic()
    encoder = Encoder(tokenizer, 64, None)
    for _ in range(2):
        with pytest.raises(DataError, match="takes too long" if bomb in SLOW else "takes more than 64 MB of memory"):
            encoder.encode_rows([talk("w1 w2", "w2")])
    assert time.monotonic() - begun < 60, "two processor seconds, on a machine that may be busy"


def test_many_renderings_are_no_long_one(tokenizer, monkeypatch):
    slowly = "{% for i in range(3000) %}{% endfor %}" + CHAT
    monkeypatch.setattr(tokenizer, "chat_template", slowly)
    monkeypatch.setattr("remix_cli.data.template.SECONDS", 0)
    encoder = Encoder(tokenizer, 64, None)
    assert len(encoder.encode_rows([talk("w1", "w2")] * 300).rows) == 300


def test_the_templates_process_ends_with_its_encoder(tokenizer):
    encoder = Encoder(tokenizer, 64, None)
    encoder.encode(talk("w1", "w2"))
    child = encoder.template._end.peek()[2][0]
    os.kill(child, signal.SIGTERM)  # as to a whole group: the parent decides
    assert encoder.encode(talk("w1", "w2"))
    del encoder
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_an_interrupted_rendering_leaves_no_answer_behind(tokenizer, monkeypatch):
    encoder = Encoder(tokenizer, 64, None)
    wanted = encoder.encode(talk("w1", "w2"))

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(encoder.template.pipe), "poll", lambda *_: interrupted(_))
        with pytest.raises(KeyboardInterrupt):
            encoder.encode(talk("w3", "w4"))
    assert encoder.encode(talk("w1", "w2")) == wanted


def test_a_template_process_that_dies_is_told(tokenizer):
    encoder = Encoder(tokenizer, 64, None)
    os.kill(encoder.template._end.peek()[2][0], signal.SIGKILL)
    with pytest.raises(RowError, match=r"the chat template ended its process \(-9\)"):
        encoder.encode(talk("w1", "w2"))


def test_a_bad_row_is_named_by_file_and_number(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in [GOOD["gsm8k"], {"question": "x", "answer": ""}]))
    with pytest.raises(DataError, match=r"rows\.jsonl: row 2: column 'answer': the answer is blank"):
        load_examples([Source(path=str(file), format="gsm8k")])
    with pytest.raises(DataError, match="row 1: no column 'prompt'; the row has question, answer"):
        load_examples([Source(path=str(file))])


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_local_files_of_every_kind(tmp_path, suffix):
    import datasets

    table = datasets.Dataset.from_list([GOOD["prompt_completion"]] * 3)
    file = tmp_path / f"train.{suffix}"
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(suffix, table.to_json)(str(file))
    for path in (file, tmp_path):
        examples, counts = load_examples([Source(path=str(path))])
        assert counts == [3]
        assert examples[0].messages[1]["content"] == "b"


def test_another_seed_gives_other_reasoning_gym_rows():
    """The package itself makes row i from seed + i, so that neighbouring seeds share nearly all rows."""
    made = [
        {row["prompt"] for row in load_rows(Source(reasoning_gym="family_relationships", size=200, seed=seed))}
        for seed in (0, 1, 2)
    ]
    assert not made[0] & made[1]
    assert not made[1] & made[2]


def test_reasoning_gym_rows_are_repeatable():
    pytest.importorskip("reasoning_gym")
    source = Source(reasoning_gym="spell_backward", size=5)
    assert load_examples([source])[0] == load_examples([source])[0]
    other = load_examples([source.model_copy(update={"seed": 1})])[0]
    assert other != load_examples([source])[0]
    assert other[0].task == "spell_backward"


def plan(counts=(40, 20), weights=(1.0, 1.0), group=True, seed=0, size=8):
    lengths = np.random.default_rng(1).integers(4, 60, sum(counts))
    return Plan(lengths, counts, weights, size, group, seed)


@pytest.mark.parametrize("group", [True, False])
def test_an_epoch_holds_every_row_once_and_is_a_function_of_seed_and_epoch(group):
    p = plan(group=group)
    steps = p.epoch(0)
    assert len(steps) == p.steps_per_epoch == 8
    assert sorted(np.concatenate(steps)) == list(range(60))
    again = plan(group=group).epoch(0)
    assert all(np.array_equal(a, b) for a, b in zip(steps, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(steps, p.epoch(1), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(steps, plan(group=group, seed=1).epoch(0), strict=True))


def test_weights_say_how_often_a_row_is_seen():
    p = plan(weights=(2.0, 0.5))
    seen = np.concatenate(p.epoch(0))
    assert [(seen == i).sum() for i in range(40)] == [2] * 40
    assert len(seen) == 90
    later = np.concatenate(p.epoch(1))
    assert set(seen[seen >= 40]) != set(later[later >= 40])


def test_grouping_by_length_saves_padding():
    def padding(p):
        return sum(p.lengths[s].max() * len(s) - p.lengths[s].sum() for s in p.epoch(0))

    assert padding(plan((400,), (1.0,))) < 0.3 * padding(plan((400,), (1.0,), group=False))


def test_ranks_share_the_micro_batches_of_one_rank_with_accumulation():
    rows, lengths = np.arange(10), np.arange(10, 20)
    alone = micro_batches(rows, lengths, 3, 0, 1)
    shared = micro_batches(rows, lengths, 3, 0, 2) + micro_batches(rows, lengths, 3, 1, 2)
    key = lambda part: part[0]  # noqa: E731
    for a, b in zip(sorted(alone, key=key), sorted(shared, key=key), strict=True):
        assert a[0] == b[0]
        assert np.array_equal(a[1], b[1])
    # four parts over three ranks: the two that would be idle repeat the first one, which does not count there
    each = [micro_batches(rows, lengths, 3, rank, 3, equally_many=True) for rank in range(3)]
    assert [len(parts) for parts in each] == [2, 2, 2]
    assert [[part[0] for part in parts] for parts in each] == [[0, 9], [3, 0], [6, 0]]
    assert [counts for parts in each for _, _, counts in parts] == [True, True, True, False, True, False]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_by_tokens_hold_all_rows_in_as_few_rounds_and_as_evenly_as_can_be(world):
    lengths = np.random.default_rng(0).integers(5, 200, 60)
    rows = np.random.default_rng(1).permutation(60)[:40]
    limit = 1000
    parts = sorted(part for rank in range(world) for part in micro_batches(rows, lengths, 3, rank, world, tokens=limit))

    def padded(part):
        return len(part) * -(-int(lengths[part].max()) // 8) * 8

    assert sorted(np.concatenate([part for _, part, _ in parts])) == sorted(rows)
    assert [first for first, _, _ in parts] == np.cumsum([0, *(len(part) for _, part, _ in parts[:-1])]).tolist()
    loads = [padded(part) for _, part, _ in parts]
    assert max(loads) <= limit
    fewest = -(-sum(-(-int(n) // 8) * 8 for n in lengths[rows]) // limit)  # if padding were nothing
    assert len(parts) <= -(-(fewest + 1) // world) * world
    assert max(padded(part) for _, part, _ in micro_batches(rows, lengths, 3, 0, 1, tokens=10**6)) == 40 * 200


@pytest.mark.parametrize(
    ("tokens", "world", "starts"), [(64, 1, [0, 5]), (80, 1, [0]), (80, 2, [0, 5]), (32, 2, [0, 3, 6, 9])]
)
def test_micro_batches_by_tokens_are_alike_where_a_full_one_would_leave_a_small_one(tokens, world, starts):
    assert starts_by_tokens(np.full(10, 8), tokens, world) == starts


def test_a_row_longer_than_a_micro_batch_by_tokens_stands_alone():
    lengths = np.array([100, 8, 8, 8])
    cuts = micro_batches(np.arange(4), lengths, 3, 0, 1, tokens=24)
    assert [part.tolist() for _, part, _ in cuts] == [[0], [1, 2, 3]]


def test_row_ids_are_unique_within_a_step():
    row = EncodedRow(np.arange(5), np.ones(5, bool), "t")
    first, second = collate([row, row], 0), collate([row], 2)
    assert torch.cat([first.rows, second.rows]).tolist() == [0, 1, 2]


def test_what_a_template_leaves_out_is_told_with_file_row_and_column(tokenizer, tmp_path, monkeypatch):
    """The column as the file calls it."""
    said = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"chat": said}) + "\n")
    source = Source(path=str(tmp_path / "x.jsonl"), format="messages", columns={"messages": "chat"})
    monkeypatch.setattr(tokenizer, "chat_template", CHAT.replace("<user> {{ m.content }}", "<user>"))
    with pytest.raises(DataError, match=r"x.jsonl: row 1: column 'chat': .* leaves out what message 1 \(user\) says"):
        Encoder(tokenizer, 64, None).encode_rows(load_examples([source])[0])
