"""The shapes in which people have their rows: each is a conversation in the end."""

import pytest

from remix_cli.data.encode import Encoder
from remix_cli.data.formats import RowError, to_example
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
        ("sharegpt", {"conversations": [{"from": "human"}]}, "message 1: no 'value'"),
        ("sharegpt", {"conversations": "a"}, "should be a list of {from, value}, is str"),
        ("sharegpt", {"conversations": SHARED[1:]}, "the first message should not be the assistant's"),
        ("alpaca", {"instruction": "a"}, "no column 'output'"),
        ("alpaca", {"history": ["a"], "instruction": "c", "output": "d"}, "column 'history': entry 1"),
        ("text", {"text": " "}, "the answer is blank"),
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
