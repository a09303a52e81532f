"""The shapes in which people have their rows: each is a conversation in the end."""

import gzip

import pytest

from remix_cli.data.encode import Encoder
from remix_cli.data.formats import RowError, to_example
from remix_cli.data.said import digest, digest_of, overlap
from remix_cli.data.sources import load_rows
from remix_cli.errors import DataError
from remix_cli.recipe.sources import Source

SAID = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
ONCE = SAID[:2]
SYSTEM = {"role": "system", "content": "s"}
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
SHAPES = {
    "messages": ("messages", {"messages": ONCE}, ONCE),
    "several turns": ("messages", {"messages": SAID}, SAID),
    "an end that nobody answers": ("messages", {"messages": [*ONCE, SAID[2]]}, ONCE),
    "content in parts": (
        "messages",
        {
            "messages": [
                ONCE[0] | {"content": [{"type": "text", "text": "a"}]},
                ONCE[1] | {"content": [{"type": "text", "text": "b"}, {"type": "text", "text": "!"}]},
            ]
        },
        [ONCE[0], {"role": "assistant", "content": "b!"}],
    ),
    "a turn that is only read": (
        "messages",
        {"messages": [SAID[0], SAID[1] | {"weight": 0}, *SAID[2:]]},
        [SAID[0], SAID[1] | {"learnt": False}, *SAID[2:]],
    ),
    "thinking": (
        "messages",
        {"messages": [ONCE[0], ONCE[1] | {"thinking": "t"}]},
        [ONCE[0], ONCE[1] | {"reasoning_content": "t"}],
    ),
    "ShareGPT": ("sharegpt", {"conversations": SHARED}, ONCE),
    "ShareGPT with a system turn": (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "s"}, *SHARED]},
        [SYSTEM, *ONCE],
    ),
    "ShareGPT in the words of messages": ("sharegpt", {"conversations": ONCE}, ONCE),
    "prompt and completion": ("prompt_completion", {"prompt": "a", "completion": "b"}, ONCE),
    "prompt and completion as messages": (
        "prompt_completion",
        {"prompt": SAID[:3], "completion": SAID[3:]},
        [SAID[0], SAID[1] | {"learnt": False}, *SAID[2:]],
    ),
    "a prompt of messages and a text": ("prompt_completion", {"prompt": ONCE[:1], "completion": "b"}, ONCE),
    "Alpaca": ("alpaca", {"instruction": "a", "input": "", "output": "b"}, ONCE),
    "Alpaca with an input": (
        "alpaca",
        {"instruction": "a", "input": "x", "output": "b"},
        [{"role": "user", "content": "a\n\nx"}, ONCE[1]],
    ),
    "Alpaca with a system text": ("alpaca", {"system": "s", "instruction": "a", "output": "b"}, [SYSTEM, *ONCE]),
    "Alpaca with a history": ("alpaca", {"history": [["a", "b"]], "instruction": "c", "output": "d"}, SAID),
    "plain text": ("text", {"text": "a"}, [{"role": "text", "content": "a"}]),
    "numbers": (
        "prompt_completion",
        {"prompt": 7, "completion": 2.5},
        [{"role": "user", "content": "7"}, {"role": "assistant", "content": "2.5"}],
    ),
    "true and false": (
        "prompt_completion",
        {"prompt": "a", "completion": True},
        [ONCE[0], {"role": "assistant", "content": "true"}],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_as_people_have_them(shape):
    form, row, messages = SHAPES[shape]
    assert list(to_example(row, Source(path="x.jsonl", format=form)).messages) == messages


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("sharegpt", {"conversations": [{"from": "me", "value": "a"}]}, "message 1: 'from' is 'me'"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "^column 'conversations': message 1: no 'value'"),
        ("sharegpt", {"conversations": "a"}, "should be a list of {from, value}, is str"),
        ("sharegpt", {"conversations": SHARED[1:]}, "the first message should not be the assistant's"),
        ("alpaca", {"instruction": "a"}, "no column 'output'"),
        ("alpaca", {"history": ["a"], "instruction": "c", "output": "d"}, "column 'history': entry 1"),
        ("text", {"text": " "}, "the answer is blank"),
        ("prompt_completion", {"conversations": SHARED}, "no column 'prompt'; .* set format: sharegpt"),
        ("messages", {"instruction": "a", "output": "b"}, "no column 'messages'; .* set format: alpaca"),
        ("prompt_completion", {"prompt": ONCE, "completion": ["b"]}, "message 3: the role"),
    ],
)
def test_rows_that_are_not_what_their_format_says(form, row, message):
    with pytest.raises(RowError, match=message):
        to_example(row, Source(path="x.jsonl", format=form))


def test_plain_text_is_learnt_as_it_stands_whatever_the_template(demo_model):
    from remix_cli.models.loading import load_tokenizer
    from remix_cli.recipe.schema import Model

    tokenizer = load_tokenizer(Model(name_or_path=str(demo_model)))
    example = to_example({"text": "Once upon <|im_end|> a time"}, Source(path="x.jsonl", format="text"))
    ids, supervised = Encoder(tokenizer, 64, None).encode(example)
    assert tokenizer.decode(ids) == f"Once upon <|im_end|> a time{tokenizer.eos_token}"
    assert ids.count(tokenizer.eos_token_id) == 1, "what the text spells out is text"
    assert all(supervised)


def test_what_only_a_template_can_write_is_refused_without_one(demo_model):
    from remix_cli.models.loading import load_tokenizer
    from remix_cli.recipe.schema import Model

    encoder = Encoder(load_tokenizer(Model(name_or_path=str(demo_model))), 64, False)
    source = Source(path="x.jsonl", format="messages")
    thinking = to_example({"messages": [ONCE[0], ONCE[1] | {"thinking": "t"}]}, source)
    with pytest.raises(RowError, match="'reasoning_content' needs a chat template"):
        encoder.encode(thinking)
    with pytest.raises(RowError, match="column 'tools' needs a chat template"):
        encoder.encode(to_example({"messages": ONCE, "tools": [{"name": "f"}]}, source))


def rows_of(path, **source):
    return load_rows(Source(path=str(path), **source))


FILES = {
    "rows.jsonl": b'{"a": "1"}\n{"a": "2"}\n',
    "rows.json": b'[{"a": "1"}, {"a": "2"}]',
    "rows.csv": b"a\n1\n2\n",
    "rows.tsv": b"a\tb\n1\tx\n2\ty\n",
    "rows.txt": b"1\n\n2\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
def test_files_of_every_kind_packed_or_not(name, packed, tmp_path):
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(FILES[name]) if packed else FILES[name])
    column = "text" if name == "rows.txt" else "a"
    assert [row[column] for row in rows_of(path)] == ["1", "2"]


def test_a_pattern_stands_for_all_files_that_match(tmp_path):
    for name, rows in (("b-2", "3"), ("b-1", "1"), ("c", "9")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"a": "{rows}"}}\n')
    assert [row["a"] for row in rows_of(tmp_path / "b-*.jsonl")] == ["1", "3"]
    with pytest.raises(DataError, match="no file matches"):
        rows_of(tmp_path / "d*.jsonl")
    (tmp_path / "b-3.csv").write_text("a\n5\n")
    with pytest.raises(DataError, match="files of several kinds"):
        rows_of(tmp_path / "b-*")


def test_another_separator_and_a_broken_archive(tmp_path):
    (tmp_path / "rows.csv").write_text("a;b\n1;2,5\n")
    assert rows_of(tmp_path / "rows.csv", separator=";") == [{"a": "1", "b": "2,5"}]
    with pytest.raises(DataError, match="names one column, 'a;b'; set separator: ';'"):
        rows_of(tmp_path / "rows.csv")
    whole = gzip.compress(b'{"a": "1"}\n')
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[:-6])
    with pytest.raises(DataError, match="not a whole gzip file"):
        rows_of(tmp_path / "rows.jsonl.gz")


def test_nulls_that_a_table_filled_in_are_no_part_of_a_call(tmp_path):
    import pyarrow
    from pyarrow import parquet

    calls = [{"city": "Rome"}, {"town": "Bath"}]
    parquet.write_table(pyarrow.table({"arguments": calls}), tmp_path / "rows.parquet")
    assert [row["arguments"] for row in rows_of(tmp_path / "rows.parquet")] == calls


def test_columns_system_and_learn_are_keys_of_a_source():
    source = Source(path="x.jsonl", format="messages", columns={"messages": "dialogue"}, system="s", learn="last")
    assert list(to_example({"dialogue": SAID}, source).messages) == [
        SYSTEM,
        SAID[0],
        SAID[1] | {"learnt": False},
        *SAID[2:],
    ]
    own = {"role": "system", "content": "own"}
    assert to_example({"dialogue": [own, *ONCE]}, source).messages[0] == own
    with pytest.raises(RowError, match="no column 'dialogue'"):
        to_example({"messages": ONCE}, source)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"format": "messages", "columns": {"mesages": "x"}},
            "names mesages, which format messages does not read; it reads messages",
        ),
        ({"format": "messages", "columns": {"messages": None}}, "names no column for messages"),
        ({"format": "text", "system": "s"}, "belongs to conversations"),
        ({"separator": ";"}, "belongs to csv and tsv files"),
    ],
)
def test_a_key_of_a_source_that_nothing_reads_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Source(path="x.jsonl", **keys)


PAIR = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "keys", "task", "weight"),
    [
        ({}, {}, "data", 1.0),
        ({"task": "sums", "weight": 0.5}, {"task": "all"}, "sums", 0.5),
        ({"task": None, "weight": None}, {"task": "all"}, "all", 1.0),
        ({"task": " ", "weight": ""}, {"task": "all"}, "all", 1.0),
        ({"task": 7, "weight": "2"}, {}, "7", 2.0),
        ({"kind": "sums", "quality": 0}, {"columns": {"task": "kind", "weight": "quality"}}, "sums", 0.0),
        ({"task": "x" * 99, "weight": "75 kg"}, {"columns": {"task": None, "weight": None}}, "data", 1.0),
        ({"task": "Add 2 and 2.", "weight": "75 kg"}, {"prompt": "{task}", "completion": "{weight}"}, "data", 1.0),
        (
            {"weight": 3},
            {"prompt": "{weight}", "columns": {"weight": "weight"}},
            "data",
            3.0,
        ),
    ],
)
def test_a_row_may_have_a_task_and_a_weight(row, keys, task, weight):
    """What a template fills in is a text like others, unless `columns` says what it is."""
    example = to_example(PAIR | row, Source(path="x.jsonl", **keys))
    assert (example.task, example.weight) == (task, weight)


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), "heavy", "nan", True, [1], 10**400])
def test_a_weight_is_a_number_that_is_not_negative(weight):
    with pytest.raises(RowError, match=r"column 'quality' is .*, should be a number that is not negative"):
        to_example(PAIR | {"quality": weight}, Source(path="x.jsonl", columns={"weight": "quality"}))


def test_younger_keys_leave_a_recipe_of_earlier_versions_as_it_was():
    """A checkpoint holds a hash of the recipe."""
    assert not {"columns", "separator", "system", "learn"} & Source(path="x.jsonl").model_dump().keys()
    assert Source(path="x.jsonl", system="s").model_dump()["system"] == "s"


def test_conversations_that_differ_in_a_call_alone_are_not_the_same():
    source = Source(path="x.jsonl", format="messages")
    made = []
    for city in ("Rome", "Bath"):
        call = {"function": {"name": "weather", "arguments": {"city": city}}}
        made.append(to_example({"messages": [ONCE[0], {"role": "assistant", "tool_calls": [call]}]}, source))
    assert overlap({digest(made[0])}, map(digest, made)) == 1
    assert digest_of(made[:1]) != digest_of(made[1:])
