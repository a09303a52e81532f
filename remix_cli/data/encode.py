"""Conversations to token ids, with the supervised ones marked.

Each stretch of text is tokenised by itself, the prompt exactly as it stands in front of the model when it
generates, so a token never straddles the border between what is given and what is learnt. The token that
ends the assistant's turn is supervised; supervision is an explicit mask, so a padding token that happens to
be the end token can neither hide it nor be learnt. What a text spells out is text, control tokens too (control.py).
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from remix_cli.data.control import NUMBER, ControlTokens, special_ids
from remix_cli.data.formats import Example, Message, RowError, to_example, without_mark
from remix_cli.data.sources import iterate_rows
from remix_cli.data.template import Template
from remix_cli.data.turns import Part
from remix_cli.errors import DataError
from remix_cli.recipe.sources import Data, Source

# A longer text is refused: it takes a second for each million characters, most of it for tokens that are cut off, and
# where to cut before tokenising, so that the tokens in front stay the same, no tokenizer says.
SPARE, CHARACTERS = 1_000_000, 100  # at any length, and for each token of max_length


Piece = tuple[list[int], bool]  # token ids, and whether they are supervised


@dataclass(frozen=True)
class EncodedRow:
    input_ids: np.ndarray  # (T,) int32
    supervised: np.ndarray  # (T,) bool: True where the token is to be predicted
    task: str


@dataclass
class Encoded:
    """Rows ready for batching, and what happened on the way."""

    rows: list[EncodedRow]
    read: int
    truncated: int  # lost their end
    dropped: int  # lost all supervised tokens to truncation
    split: int = 0  # conversations that became several rows

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row.input_ids) for row in self.rows])

    @property
    def target_counts(self) -> np.ndarray:
        """Supervised tokens of each row; the first token has nothing before it to be predicted from."""
        return np.array([int(row.supervised[1:].sum()) for row in self.rows])

    @property
    def repeated(self) -> int:
        """Rows that say the same as an earlier one."""
        return len(self.rows) - len({row.input_ids.tobytes() for row in self.rows})

    def describe(self) -> str:
        notes = [f"{len(self.rows)} rows", f"{int(self.target_counts.sum()):,} supervised tokens"]
        if self.split:
            notes.append(f"{self.split} conversations as a row for each turn, as the chat template needs it")
        if self.truncated:
            notes.append(f"{self.truncated} cut at max_length")
        if self.dropped:
            notes.append(f"{self.dropped} dropped: nothing supervised before the cut")
        return ", ".join(notes)


class Encoder:
    """Applies a tokenizer and its chat template, or plain text where there is none."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        use_chat_template: bool | None,
        allow_special_tokens: bool = False,
        template_settings: dict[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        if use_chat_template and not tokenizer.chat_template:
            raise DataError("data.use_chat_template: this tokenizer has no chat template; set it to false")
        if template_settings and not tokenizer.chat_template:
            raise DataError("data.chat_template_kwargs: this tokenizer has no chat template; leave them out")
        self.chat = bool(tokenizer.chat_template) if use_chat_template is None else use_chat_template
        self.template = Template(tokenizer, template_settings or {}) if tokenizer.chat_template else None
        self.special = special_ids(tokenizer)
        self.kept: set[str] = set()  # forms of conversations of which the template renders everything
        self.control: ControlTokens | None = None
        if not allow_special_tokens:
            self.control = ControlTokens(tokenizer, self.template.scaffold() if self.template else "")

    @classmethod
    def of(cls, tokenizer: Any, data: Data) -> "Encoder":
        """As the recipe's `data` says."""
        return cls(
            tokenizer,
            data.max_length,
            data.use_chat_template,
            data.allow_special_tokens,
            data.chat_template_kwargs,
        )

    def parts(self, example: Example) -> list[list[Part]]:
        """The conversation's text as rows, each in stretches. Raises RowError.

        One row, but for chat templates that show earlier turns differently once later ones follow (turns.py). Control
        tokens of contents are marked in it.
        """
        messages = self._marked(list(example.messages))
        if messages[0]["role"] == "text":
            return [[Part(messages[0]["content"], True, True)]]
        if not self.chat or not self.template:
            return [_plain_parts(messages, example.tools)]
        tools = self._marked(list(example.tools))
        self._check_kept(self.template, messages, tools)
        return self.template.rows(messages, tools)

    def _check_kept(self, template: Template, messages: list[Message], tools: list[Any]) -> None:
        """Raises RowError if the template leaves something out of conversations of this form.

        Asked with texts of our own: short ones that also stand in the scaffolding would not be missed.
        """
        named = [_named(i, message) for i, message in enumerate(messages)]
        form = json.dumps(named) + str(len(tools))
        if form not in self.kept:
            template.rows(named, tools)
            self.kept.add(form)

    def with_shots(self, example: Example, shots: list[Example]) -> Example:
        """The example after solved ones, as earlier turns of one conversation."""
        messages: list[Message] = []
        for shot in shots:
            messages += shot.messages
        messages += example.messages
        return Example(tuple(messages), example.task, example.tools)

    def _mark(self, text: str) -> str:
        return self.control.mark(text) if self.control else text

    def _marked(self, value: Any) -> Any:
        """The same with every text in it marked."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, list):
            return [self._marked(inner) for inner in value]
        if isinstance(value, dict):
            return {key: self._marked(inner) for key, inner in value.items()}
        return value

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        if self.control:
            return self.control.ids(text, add_special_tokens)
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def text_ids(self, text: str) -> list[int]:
        """A text as it is, after the tokenizer's opening token, whatever the template. Raises RowError."""
        return self._ids(self._mark(text), add_special_tokens=True)

    def _closed(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """An assistant's turn up to its end token, and what a template puts after it, which is not learnt."""
        eos = self.tokenizer.eos_token_id
        if eos in ids:
            end = len(ids) - ids[::-1].index(eos)  # just after its last one
            return ids[:end], ids[end:]
        if any(i in self.special for i in ids[-2:]):  # the template ends this turn with another token
            return ids, []
        return [*ids, eos], []

    def _rows(self, example: Example) -> list[list[Piece]]:
        """The conversation's tokens as rows, each in stretches that are supervised or not. Raises RowError."""
        length = sum(map(_size, example.messages))
        most = SPARE + CHARACTERS * self.max_length
        if length > most:
            raise RowError(
                f"its text has {length:,} characters, data.max_length = {self.max_length} allows {most:,}; "
                "shorten it, or take the row out"
            )
        # Chat templates write their special tokens themselves; plain text gets the tokenizer's opening token.
        plain = not self.chat or example.messages[0]["role"] == "text"
        return [self._pieces(parts, plain) for parts in self.parts(example)]

    def _pieces(self, parts: list[Part], plain: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            ids = self._ids(part.text, add_special_tokens=plain and not pieces)
            if part.answer:
                turn, after = self._closed(ids)
                pieces += [(turn, part.learnt), (after, False)]
            else:
                pieces.append((ids, False))
        return pieces

    def prompt_ids(self, example: Example) -> list[int]:
        """Everything before the last assistant's turn, as it is given to the model to continue."""
        messages = [without_mark(message) for message in example.messages]
        *_, last = self._rows(Example(tuple(messages), example.task, example.tools))
        before = last[:-2]  # the last two: the turn, and what the template puts after it
        ids, _ = _joined(before)
        return ids

    def question_ids(self, text: str) -> list[int]:
        """A user's turn, ready to be answered. Raises DataError."""
        turns = ({"role": "user", "content": text}, {"role": "assistant", "content": "."})
        try:
            return self.prompt_ids(Example(turns, "question"))
        except RowError as error:
            raise DataError(f"prompt: {error}") from None

    def rows(self, example: Example) -> list[tuple[list[int], list[bool]]]:
        """Token ids and supervision of the conversation's rows, to the last turn's end token, not truncated."""
        return [_joined(pieces[:-1]) for pieces in self._rows(example)]

    def encode(self, example: Example) -> tuple[list[int], list[bool]]:
        """The last of its rows: the conversation as it stands at its end."""
        return self.rows(example)[-1]

    def encode_rows(self, examples: list[Example]) -> Encoded:
        """Rows over max_length lose their end; a row left without a supervised token is dropped and counted."""
        encoded = Encoded([], len(examples), 0, 0)
        for number, example in enumerate(examples, start=1):
            try:
                rows = self.rows(example)
            except RowError as error:
                where = example.origin or f"task {example.task}: conversation {number}"
                raise DataError(f"{where}: {error}") from None
            encoded.split += len(rows) > 1
            for ids, supervised in rows:
                self._add(encoded, ids, supervised, example.task)
        return encoded

    def _add(self, encoded: Encoded, ids: list[int], supervised: list[bool], task: str) -> None:
        cut = len(ids) > self.max_length
        ids, supervised = ids[: self.max_length], supervised[: self.max_length]
        if not any(supervised[1:]):
            encoded.dropped += 1
            return
        encoded.truncated += cut
        encoded.rows.append(EncodedRow(np.array(ids, dtype=np.int32), np.array(supervised), task))


def _joined(pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """All token ids, and of each whether it is supervised."""
    ids: list[int] = []
    supervised: list[bool] = []
    for piece, learnt in pieces:
        ids += piece
        supervised += [learnt] * len(piece)
    return ids, supervised


def _plain_parts(messages: list[Message], tools: tuple[Any, ...]) -> list[Part]:
    """Without a chat template: each given turn ends with a line break, each learnt one with the end token.

    Raises RowError for what only a template can write.
    """
    parts = []
    for message in messages:
        for key in ("tool_calls", "reasoning_content"):
            if key in message:
                raise RowError(f"{key!r} needs a chat template, and this tokenizer has none or is not to use it")
        answer = message["role"] == "assistant"
        text = message["content"]
        parts.append(Part(text if answer else f"{text}\n", answer, answer and message.get("learnt", True)))
    if tools:
        raise RowError("column 'tools' needs a chat template, and this tokenizer has none or is not to use it")
    return parts


def _named(index: int, message: Message) -> Message:
    """A message of the same form with texts that stand nowhere else."""
    named = message | {"content": f"content{index}{NUMBER}" if message["content"] else ""}
    if "reasoning_content" in message:
        named["reasoning_content"] = f"thought{index}{NUMBER}"
    if "tool_calls" in message:
        named["tool_calls"] = [_named_call(f"{index}{number}") for number in range(len(message["tool_calls"]))]
    if "name" in message:
        named["name"] = f"name{index}"
    if "tool_call_id" in message:
        named["tool_call_id"] = ID
    return named


ID = "call00001"  # some templates want nine characters


def _named_call(which: str) -> dict[str, Any]:
    function = {"name": f"function{which}{NUMBER}", "arguments": {"argument": f"value{which}{NUMBER}"}}
    return {"type": "function", "id": ID, "function": function}


def _size(message: Message) -> int:
    """Characters, roughly, where a turn holds more than its content."""
    size = len(message["content"]) + len(message.get("reasoning_content", ""))
    if "tool_calls" in message:
        size += len(json.dumps(message["tool_calls"]))
    return size


def load_examples(sources: list[Source]) -> tuple[list[Example], list[int]]:
    """Examples of all sources in order, and how many each source gave. Raises DataError with row numbers."""
    examples: list[Example] = []
    counts: list[int] = []
    for source in sources:
        before = len(examples)
        for row, origin in iterate_rows(source):
            try:
                examples.append(to_example(row, source, origin))
            except RowError as error:
                raise DataError(f"{origin}: {error}") from None
        counts.append(len(examples) - before)
    return examples, counts
