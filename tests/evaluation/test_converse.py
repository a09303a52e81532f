"""Talking to a run: the history, commands, top-p, and prompts out of files."""

import io
import json

import pytest
import torch
from helpers.tiny import CHAT, fill_adapter

from remix_cli.data.encode import Encoder
from remix_cli.data.formats import ANSWER
from remix_cli.data.prompts import prompts_in
from remix_cli.errors import DataError
from remix_cli.evaluation import converse
from remix_cli.evaluation.converse import Conversation
from remix_cli.evaluation.generate import Decoding, generate
from remix_cli.recipe import Source
from remix_cli.runs import load_run


@pytest.fixture(scope="module")
def run(finished):
    loaded = load_run(finished)
    fill_adapter(loaded.adapter, strength=2.0)  # so that it says something else than the base model
    return loaded


@pytest.fixture
def talk(verb, monkeypatch, finished):
    """`remix chat` with these lines piped in; (stdout, stderr)."""

    def call(*lines, options=(), expect=0):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return verb("chat", finished, "--max-new-tokens", 4, *options, expect=expect)

    return call


def nowhere(text):
    pass


def words(run, ids):
    return run.tokenizer.decode(ids)


def test_a_turn_is_answered_as_it_stands_in_the_whole_conversation(run):
    conversation = Conversation(run, Decoding(4), "w39")
    conversation.ask("w1 w2")
    first = conversation.reply(nowhere)
    conversation.keep(first)
    conversation.ask("w3")
    second = conversation.reply(nowhere)
    assert words(run, first.prompt) == "<user> w39 <user> w1 w2 <bot>"
    assert words(run, second.prompt) == f"{words(run, first.prompt)} {first.text.strip()} <eos> <user> w3 <bot>"
    assert second.text.strip() == words(run, [t for t in second.new if t != 1])


def test_another_answer_takes_the_place_of_the_last_and_is_another_draw(run):
    conversation = Conversation(run, Decoding(8, temperature=2.0))
    assert not conversation.reopen()
    conversation.ask("w1")
    first = conversation.reply(nowhere)
    conversation.keep(first)
    assert conversation.reopen()
    again = conversation.reply(nowhere)
    assert again.prompt == first.prompt
    assert again.new != first.new
    conversation.keep(again)
    assert len(conversation.turns) == 2


def test_the_base_model_answers_the_same_conversation_without_the_adapter(run):
    conversation = Conversation(run, Decoding(6))
    conversation.ask("w1 w2 w7 ?")
    mine, base = conversation.reply(nowhere), conversation.reply(nowhere, base=True)
    with torch.no_grad(), run.adapter.disabled():
        logits = run.model(torch.tensor([base.prompt])).logits
    assert base.prompt == mine.prompt
    assert base.new[0] == int(logits[0, -1].argmax())
    assert base.new != mine.new


def test_thinking_is_kept_apart_from_what_was_said(run):
    conversation = Conversation(run, Decoding(4))
    conversation.ask("w1")
    conversation.keep(converse.Answer([], [], "<think>\nw5 w6\n</think>\n\nw9"))
    assert conversation.turns[-1] == {"role": "assistant", "content": "w9", "reasoning_content": "w5 w6"}


def test_a_conversation_that_the_model_cannot_read_is_refused_and_forgets_the_turn(run, monkeypatch):
    conversation = Conversation(run, Decoding(300))
    conversation.ask("w1")
    monkeypatch.setattr(converse, "longest_input", lambda model: 8)
    assert len(conversation.reply(nowhere).new) <= 5  # as much as there is room for
    with pytest.raises(DataError, match="the model reads at most 8; begin anew"):
        conversation.ask(" ".join(["w2"] * 9))
    assert len(conversation.turns) == 1


def test_top_p_draws_from_the_likeliest_tokens_alone(run):
    prompt = [4, 9, 12]
    with torch.no_grad():
        q = run.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    order = q.argsort(descending=True)
    before = q[order].cumsum(0) - q[order]
    nucleus = {run.tokenizer.decode([i], skip_special_tokens=True) for i in order[before < 0.5].tolist()}
    drawn = {t for _, t in generate(run, [prompt] * 500, list(range(500)), Decoding(1, 1.0, top_p=0.5), 500)}
    drawn = {text.strip() for text in drawn}
    assert drawn == nucleus
    assert len({t for _, t in generate(run, [prompt] * 500, list(range(500)), Decoding(1, 1.0), 500)}) > len(nucleus)


def test_lines_that_are_piped_in_are_a_turn_each(talk):
    out, err = talk("w1 w2", "w3", "/new", "w1 w2", "/routing", "w4")
    answers = out.splitlines()
    assert answers[0] == answers[2]  # the same conversation again
    assert err == "(a new conversation)\n(the LoRAs behind every token: on)\n"
    assert "LoRAs of model.layers.1.mlp, for each token of the answer:" in out
    assert all(len(line) <= 80 for line in answers)


def test_base_and_adapter_stand_side_by_side_within_80_columns(talk):
    out, _ = talk("/base", " ".join(f"w{i}" for i in range(20)))
    head, *rest = out.splitlines()
    assert head.split() == ["adapter", "base", "model"]
    assert rest
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/agian", "/agian: no such command; /help lists them"),
        ("/again", "/again: nothing was asked yet"),
        ("/temperature warm", "/temperature: give a number from 0 to 5"),
        ("/top-p 2", "/top-p: give a number from 0.01 to 1"),
        (" ".join(["w1"] * 300), "the model reads at most 256; begin anew"),
    ],
)
def test_what_cannot_be_done_is_one_line(talk, line, message):
    _, err = talk(line, expect=2)
    assert message in err


def test_other_commands(talk):
    out, err = talk("/system w5 w6", "w1", "/temperature 1", "/top-p 0.9", "/again", "/system", "/help", "/quit", "w2")
    assert "(temperature 1, top-p 0.9)" in err
    assert "without a system prompt" in err
    assert "/again         another answer" in out
    assert len(out.splitlines()) == 2 + 7


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_ctrl_c_ends_the_answer_and_an_error_the_turn_but_not_the_conversation(verb, finished, monkeypatch):
    reply, left = Conversation.reply, [True]

    def stop_once(self, write, **options):
        if left.pop() if left else False:
            raise KeyboardInterrupt
        return reply(self, write, **options)

    monkeypatch.setattr(Conversation, "reply", stop_once)
    monkeypatch.setattr("sys.stdin", Terminal("w1 w2\n/nothing\n/again\n"))
    out, err = verb("chat", finished, "--max-new-tokens", 4)
    assert "(stopped; /again asks for it anew)" in out
    assert "error: /nothing: no such command" in err
    assert out.splitlines()[-1] == "> "
    assert out.splitlines()[-2].startswith("w")


def test_a_model_without_a_chat_template_says_so(verb, monkeypatch, finished):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\n"))
    init = converse.LoadedRun.__init__

    def plain(self, *arguments, **named):
        init(self, *arguments, **named)
        self.encoder.chat = False

    monkeypatch.setattr(converse.LoadedRun, "__init__", plain)
    _, err = verb("chat", finished, "--max-new-tokens", 2)
    assert err.startswith("no chat template: a message is its text and a line break")


def test_top_p_without_a_temperature_is_refused(verb, finished):
    for name in ("chat", "generate"):
        _, err = verb(name, finished, "--top-p", 0.9, expect=2)
        assert "--top-p: says how answers are drawn" in err


def rows(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_prompts_of_a_file_are_answered_in_its_order(verb, finished, tmp_path):
    prompts = ["w1 w2", "w3", "w4 w5 w6 w7 ?", "w8"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(prompts) + "\n")
    options = ("--max-new-tokens", 4, "--jsonl")
    out, _ = verb("generate", finished, "--file", file, *options)
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in found] == prompts
    alone, _ = verb("generate", finished, *prompts, *options)
    assert alone == out
    text, _ = verb("generate", finished, "--file", file, "--max-new-tokens", 4)
    assert text.splitlines()[::2] == [f"> {prompt}" for prompt in prompts]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "w1"},
        {"prompt": "w1", "completion": "w2"},
        {"messages": [{"role": "user", "content": "w1"}]},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
        {"conversations": [{"from": "human", "value": "w1"}]},
        {"instruction": "w1", "output": "w2"},
        {"question": "w1"},
        {"question": "w1", "answer": "w2 #### 3"},
    ],
    ids=lambda row: "-".join(row),
)
def test_rows_of_any_format_are_prompts_with_an_answer_or_without(run, tmp_path, row):
    (example,) = prompts_in(rows(tmp_path / "rows.jsonl", row), run.recipe.data.train[0])
    assert run.encoder.prompt_ids(example) == run.encoder.question_ids("w1")


def test_a_conversation_under_another_name_that_ends_with_a_tools_result_is_a_prompt(run, tmp_path):
    """Whoever is to speak next is the assistant."""
    turns = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}, {"from": "tool", "value": "w3"}]
    like = Source(path="rows.jsonl", format="sharegpt", columns={"conversations": "talk"})
    (example,) = prompts_in(rows(tmp_path / "rows.jsonl", {"talk": turns}), like)
    assert [message["content"] for message in example.messages] == ["w1", "w2", "w3", ANSWER]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, "no such file of prompts"),
        ("empty.txt", "", "holds no prompt; give one a line"),
        ("blank.txt", "\n \n", "holds no prompt; give one a line"),
        ("empty.jsonl", "", "no"),
        ("rows.md", "w1", "a file of prompts ends in .json, .jsonl"),
        ("rows.jsonl", '{"prompt": "w1"}\n{"text_of": 3}\n', "row 2: "),
    ],
)
def test_a_file_without_prompts_is_one_line_and_exit_2(verb, finished, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    _, err = verb("generate", finished, "--file", tmp_path / name, expect=2)
    assert message in err
    assert err.count("\n") == 1


def test_nothing_typed_is_one_line_and_exit_2(verb, finished, monkeypatch):
    for name in ("chat", "generate"):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
        _, err = verb(name, finished, expect=2)
        assert err.startswith("error: standard input: closed or empty")


def test_a_template_without_a_place_for_a_system_prompt_is_told(finished):
    loaded = load_run(finished)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt here') }}{% endif %}"
    loaded.tokenizer.chat_template = refusal + CHAT
    loaded.encoder = Encoder.of(loaded.tokenizer, loaded.recipe.data)
    Conversation(loaded, Decoding(2)).check()
    with pytest.raises(DataError, match="no system prompt here"):
        Conversation(loaded, Decoding(2), "w1").check()
