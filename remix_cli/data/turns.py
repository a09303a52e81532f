"""Which stretches of a rendered conversation are the assistant's.

A chat template says what stands in front of an answer (`add_generation_prompt`) and what a finished conversation looks
like. The answer is what the second has and the first has not. Three things make this less simple:

1. Some templates open an answer in one way when it is asked for and in another when it is done: with `<think>` and
   without, for example. What both have in common is given, the rest of the finished turn is learnt.
2. Some show the system's text only until the answer is there (Mistral's).
3. Some render an earlier turn differently once later ones follow: without its thinking, or without an end token. Then
   each answer needs a row of its own, in which it stands as it did when it was the last.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from remix_cli.data.formats import Message, RowError

Render = Callable[[list[Message], bool], str]  # messages, with the generation prompt behind them?


class Part(NamedTuple):
    """A stretch of a row's text."""

    text: str
    answer: bool  # an assistant's turn, with what ends it
    learnt: bool


@dataclass(frozen=True)
class Turn:
    """One answer as it was when it was the last: what stood before it, and what the assistant added."""

    index: int  # of the message
    learnt: bool
    prompt: str
    answer: str
    opened: int  # where in the whole text the turn began, with whatever the template opens it with

    @property
    def whole(self) -> str:
        return self.prompt + self.answer


def rows_of(render: Render, messages: list[Message], tools: list[Any]) -> list[list[Part]]:
    """One row where the template leaves earlier turns as they were, else one for each learnt turn.

    Raises RowError where the template leaves out what a message says, or where an answer begins cannot be told.
    """
    turns = [_turn(render, messages, i) for i, message in enumerate(messages) if message["role"] == "assistant"]
    for turn in turns:
        _check_answer(turn, messages[turn.index])
    if tools:
        _check_tools(turns[0].prompt, tools)
    if all(after.prompt.startswith(before.whole) for before, after in itertools.pairwise(turns)):
        return [_one_row(turns, messages)]
    rows = []
    for turn in turns:
        if turn.learnt:
            _check_given(turn.prompt, messages, range(turn.index))
            rows.append([Part(turn.prompt, False, False), Part(turn.answer, True, True)])
    return rows


def _turn(render: Render, messages: list[Message], index: int) -> Turn:
    asked = render(messages[:index], True)
    done = render(messages[: index + 1], False)
    learnt = messages[index].get("learnt", True)
    if done.startswith(asked):
        return Turn(index, learnt, asked, done[len(asked) :], opened=len(asked))
    before = render(messages[:index], False)
    shared = _length_in_common(asked, done)
    if asked.startswith(before) and shared > len(before):
        return Turn(index, learnt, done[:shared], done[shared:], opened=len(before))
    answer = _answer_without_system(render, messages, index, done)
    if answer is None:
        raise RowError(
            "the chat template shows a conversation differently once it is answered, so where the answer begins cannot "
            "be told; use another template"
        )
    return Turn(index, learnt, asked, answer, opened=len(asked))


def _answer_without_system(render: Render, messages: list[Message], index: int, done: str) -> str | None:
    """The answer where a template shows the system's text only in front of the user's turn that is to be answered.

    Mistral's do: what generation is given has that text, the finished conversation has it no more, and the answer is
    what the same conversation without it goes on with. None for other templates.
    """
    if messages[0]["role"] != "system":
        return None
    bare = messages[1:]
    if render(bare[:index], False) != done:
        return None
    asked = render(bare[: index - 1], True)
    return done[len(asked) :] if done.startswith(asked) else None


def _length_in_common(a: str, b: str) -> int:
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return index
    return min(len(a), len(b))


def _one_row(turns: list[Turn], messages: list[Message]) -> list[Part]:
    parts: list[Part] = []
    done = ""  # the text of all turns so far
    checked = 0  # messages that have been found in it
    for turn in turns:
        given = turn.prompt[len(done) :]
        _check_given(given, messages, range(checked, turn.index))
        parts += [Part(given, False, False), Part(turn.answer, True, turn.learnt)]
        done = turn.whole
        checked = turn.index + 1
    return parts


def _check_given(rendered: str, messages: list[Message], which: range) -> None:
    """What is only read may lose its thinking, as templates have it, but nothing else."""
    for index in which:
        _check_said(rendered, messages[index], index)


def _check_answer(turn: Turn, message: Message) -> None:
    rendered = turn.whole[turn.opened :]
    _check_said(rendered, message, turn.index)
    _check(rendered, message.get("reasoning_content", ""), message, turn.index, "thinks (reasoning_content)")


def _check_said(rendered: str, message: Message, index: int) -> None:
    _check(rendered, message["content"], message, index, "says")
    for call in message.get("tool_calls", []):
        function = call["function"]
        for text in (function["name"], *_leaves(function["arguments"])):
            _check(rendered, text, message, index, "calls (tool_calls)")


def _check_tools(rendered: str, tools: list[Any]) -> None:
    for tool in tools:
        name = tool.get("function", tool)["name"]
        if not _holds(rendered, name):
            raise RowError(
                f"the chat template does not show the model its tools ({name!r} is not in what it writes); use a "
                "template that does, or write them into a system message"
            )


def _check(rendered: str, text: str, message: Message, index: int, what: str) -> None:
    if not _holds(rendered, text):
        raise RowError(
            f"the chat template leaves out what message {index + 1} ({message['role']}) {what}; use a template that "
            "shows it, or take it out of the row"
        )


def _leaves(value: Any) -> list[str]:
    """The texts, numbers and names in arguments, however deep."""
    if isinstance(value, dict):
        found = list(value)
        for inner in value.values():
            found += _leaves(inner)
        return found
    if isinstance(value, list):
        found = []
        for inner in value:
            found += _leaves(inner)
        return found
    return [value] if isinstance(value, str) else []


def _holds(rendered: str, text: str) -> bool:
    """Is the text in what was rendered? Templates may trim and wrap it, and some write it as JSON."""
    found = _without_space(rendered)
    as_json = json.dumps(text, ensure_ascii=False)[1:-1]
    return _without_space(text) in found or _without_space(as_json) in found


def _without_space(text: str) -> str:
    return "".join(text.split())
