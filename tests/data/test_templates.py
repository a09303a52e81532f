"""Chat templates of public models: exactly what the assistant says is learnt, and nothing is lost in silence."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from remix_cli.data.encode import Encoder
from remix_cli.data.formats import RowError, to_example
from remix_cli.data.template import clock_stopped_at
from remix_cli.recipe.sources import Source

FOLDER = Path(__file__).parent / "templates"
# The token that ends an assistant's turn; the models' own generation settings name it.
END = {
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_v3_1": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "lfm2_2_5": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "mistral_v3": "</s>",
    "nemotron_3_nano": "<|im_end|>",
    "nemotron_3_super": "<|im_end|>",
    "phi3": "<|endoftext|>",
    "phi3_5": "<|endoftext|>",
    "phi4": "<|im_end|>",
    "phi4_mini": "<|endoftext|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "smollm3": "<|im_end|>",
}
# By template and conversation: what each row learns, as one text for each answer; or why it is refused.
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
WEATHER = {
    "name": "weather_of",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "Which."}}},
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather_of", "arguments": '{"town": "Rome-7"}'}}
CONVERSATIONS = {
    "single": [user("First question?"), assistant("First answer.")],
    "several turns": [
        user("First question?"),
        assistant("First answer."),
        user("Second question?"),
        assistant("Second answer."),
    ],
    "system": [{"role": "system", "content": "Be brief."}, user("First question?"), assistant("First answer.")],
    "thinking": [
        user("First question?"),
        assistant("First answer.", reasoning_content="First thought."),
        user("Second question?"),
        assistant("Second answer.", reasoning_content="Second thought."),
    ],
    "tools": [
        user("First question?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "name": "weather_of", "tool_call_id": "abcdefghi", "content": "Rain, 12 degrees."},
        assistant("First answer."),
    ],
}


def spelling_tokenizer(template: str, end: str) -> PreTrainedTokenizerFast:
    """One token for each byte, and the two that open and end: what is decoded is what was encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelling = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, bos_token="<bos>", eos_token=end)
    tokenizer.add_tokens(["<|call|>"], special_tokens=True)  # GPT-OSS ends a call with it
    tokenizer.chat_template = template
    return tokenizer


def encoder_of(name: str, **settings) -> Encoder:
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return Encoder(spelling_tokenizer(template, END[name]), 10_000, True, template_settings=settings)


def example_of(conversation: str, **more):
    row = {"messages": CONVERSATIONS[conversation]} | more
    if conversation == "tools":
        row["tools"] = [{"type": "function", "function": WEATHER}]
    return to_example(row, Source(path="x.jsonl", format="messages"))


def learnt(encoder: Encoder, example) -> list[list[str]]:
    """Of each row the supervised stretches, decoded."""
    rows = []
    for ids, supervised in encoder.rows(example):
        stretches: list[list[int]] = []
        before = False
        for token, now in zip(ids, supervised, strict=True):
            if now and not before:
                stretches.append([])
            if now:
                stretches[-1].append(token)
            before = now
        rows.append([encoder.tokenizer.decode(stretch) for stretch in stretches])
    return rows


@pytest.mark.parametrize("name", END)
def test_what_is_learnt_with_the_templates_of_public_models(name):
    """Refused conversations say why; in all others every word of the assistant's is learnt, and nobody else's."""
    encoder = encoder_of(name)
    for conversation, messages in CONVERSATIONS.items():
        expected = EXPECTED[name][conversation]
        if isinstance(expected, str):
            with pytest.raises(RowError) as refused:
                encoder.rows(example_of(conversation))
            assert expected in str(refused.value), (conversation, str(refused.value))
            continue
        rows = learnt(encoder, example_of(conversation))
        assert rows == expected, conversation
        text = "".join("".join(row) for row in rows)
        for message in messages:
            said = [message["content"], message.get("reasoning_content")]
            said += ["weather_of", "Rome-7"] if "tool_calls" in message else []
            for words in filter(None, said):
                assert (words in text) == (message["role"] == "assistant"), (conversation, words)


def test_an_answer_follows_what_generation_is_given():
    """With templates that open an answer in one way only; the others are named."""
    opened_otherwise = set()
    for name in END:
        encoder = encoder_of(name)
        given = encoder.tokenizer.apply_chat_template(
            CONVERSATIONS["single"][:1], tokenize=False, add_generation_prompt=True
        )
        trained = encoder.tokenizer.decode(encoder.prompt_ids(example_of("single")))
        if given != trained:
            opened_otherwise.add(name)
    assert opened_otherwise == {"deepseekv3", "nemotron_3_nano", "nemotron_3_super"}
    settings = {"enable_thinking": False}
    encoder = encoder_of("nemotron_3_nano", **settings)
    given = encoder.tokenizer.apply_chat_template(
        CONVERSATIONS["single"][:1], tokenize=False, add_generation_prompt=True, **settings
    )
    assert encoder.tokenizer.decode(encoder.prompt_ids(example_of("single"))) == given
    assert learnt(encoder, example_of("single")) == [["First answer.<|im_end|>"]]


def test_only_some_turns_are_learnt():
    weighted = [dict(message) for message in CONVERSATIONS["several turns"]]
    weighted[1]["weight"] = 0
    for name in ("llama3", "qwen3"):  # one row, and a row for each turn
        encoder = encoder_of(name)
        whole = learnt(encoder, example_of("several turns"))
        one = learnt(encoder, example_of("several turns", messages=weighted))
        assert one == [whole[-1][-1:]]


def test_a_system_text_that_only_the_question_at_hand_shows():
    """Mistral's template puts it in front of the user's last turn and, once that is answered, nowhere."""
    encoder = encoder_of("mistral_v3")
    system = {"role": "system", "content": "Be brief."}
    said = [system, *CONVERSATIONS["several turns"]]
    example = example_of("several turns", messages=said)
    rows = [encoder.tokenizer.decode(ids) for ids, _ in encoder.rows(example)]
    given = [
        encoder.tokenizer.apply_chat_template(said[:count], tokenize=False, add_generation_prompt=True)
        for count in (2, 4)
    ]
    assert [text.count("Be brief.") for text in given] == [1, 1]
    assert rows == [f"{given[0]} First answer.</s>", f"{given[1]} Second answer.</s>"]
    assert learnt(encoder, example) == [[" First answer.</s>"], [" Second answer.</s>"]]
    called = [system, *CONVERSATIONS["tools"]]
    with pytest.raises(RowError, match=r"leaves out what message 1 \(system\) says"):
        encoder.rows(example_of("tools", messages=called))


@pytest.mark.parametrize(
    ("name", "said"), [("llama3_2", "05 Mar 2026"), ("gptoss", "2026-03-05"), ("smollm3", "05 March 2026")]
)
def test_a_template_that_writes_the_date_takes_the_day_that_it_is_given(name, said, monkeypatch):
    """To the letter what it writes on that day, and no other day's rows."""

    class Then(chat_template_utils.datetime):
        @classmethod
        def now(cls, *_):
            return cls(2026, 3, 5)

    tokenizer = encoder_of(name).tokenizer
    given = Encoder(tokenizer, 10_000, True, template_date="2026-03-05").rows(example_of("several turns"))
    other = Encoder(tokenizer, 10_000, True, template_date="2026-03-06").rows(example_of("several turns"))
    assert said in tokenizer.decode(given[0][0])
    assert given != other
    monkeypatch.setattr(chat_template_utils, "datetime", Then)
    assert given == Encoder(tokenizer, 10_000, True).rows(example_of("several turns"))


def test_every_directive_of_a_format_is_filled_in():
    written = "[{{ strftime_now('%A %a, %-d. %B (%b) %Y, %y-%m-%d %H:%M:%S 100%%') }}]"
    tokenizer = spelling_tokenizer("\n" + written, "<|im_end|>")
    shown = tokenizer.apply_chat_template(
        [user("x")], tokenize=False, chat_template=clock_stopped_at("2026-03-05") + "\n" + written
    )
    assert shown == "\n[Thursday Thu, 5. March (Mar) 2026, 26-03-05 00:00:00 100%]"
