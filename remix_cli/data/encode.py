"""Conversations to token ids, with the supervised ones marked.

Each stretch of text is tokenised by itself, the prompt exactly as it stands in front of the model when it
generates, so a token never straddles the border between what is given and what is learnt. The token that
ends the assistant's turn is supervised; supervision is an explicit mask, so a padding token that happens to
be the end token can neither hide it nor be learnt. What a text spells out is text, control tokens too (control.py).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from remix_cli.data.control import NUMBER, ControlTokens
from remix_cli.data.formats import Example, Message, RowError, to_example
from remix_cli.data.sources import load_rows
from remix_cli.data.template import Template
from remix_cli.errors import DataError
from remix_cli.recipe.sources import Data, Source

# A longer text is refused: it takes a second for each million characters, most of it for tokens that are cut off, and
# where to cut before tokenising, so that the tokens in front stay the same, no tokenizer says.
SPARE, CHARACTERS = 1_000_000, 100  # at any length, and for each token of max_length


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

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row.input_ids) for row in self.rows])

    @property
    def target_counts(self) -> np.ndarray:
        """Supervised tokens of each row; the first token has nothing before it to be predicted from."""
        return np.array([int(row.supervised[1:].sum()) for row in self.rows])

    def describe(self) -> str:
        notes = [f"{len(self.rows)} rows", f"{int(self.target_counts.sum()):,} supervised tokens"]
        if self.truncated:
            notes.append(f"{self.truncated} cut at max_length")
        if self.dropped:
            notes.append(f"{self.dropped} dropped: nothing supervised before the cut")
        return ", ".join(notes)


class Encoder:
    """Applies a tokenizer and its chat template, or plain text where there is none."""

    def __init__(
        self, tokenizer: Any, max_length: int, use_chat_template: bool | None, allow_special_tokens: bool = False
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        if use_chat_template and not tokenizer.chat_template:
            raise DataError("data.use_chat_template: this tokenizer has no chat template; set it to false")
        self.chat = bool(tokenizer.chat_template) if use_chat_template is None else use_chat_template
        self.template = Template(tokenizer) if tokenizer.chat_template else None
        self.kept: set[tuple[str, ...]] = set()  # roles of conversations whose every content the template renders
        self.control: ControlTokens | None = None
        if not allow_special_tokens:
            self.control = ControlTokens(tokenizer, self.template.scaffold() if self.template else "")

    @classmethod
    def of(cls, tokenizer: Any, data: Data) -> "Encoder":
        """As the recipe's `data` says."""
        return cls(tokenizer, data.max_length, data.use_chat_template, data.allow_special_tokens)

    def segments(self, example: Example) -> list[tuple[str, bool]]:
        """The conversation's text in order, each stretch with whether it is supervised. Raises RowError.

        Control tokens of contents are marked in it.
        """
        messages = [{"role": m["role"], "content": self._mark(m["content"])} for m in example.messages]
        if not self.chat or not self.template:
            return _plain_segments(messages)
        roles = tuple(m["role"] for m in messages)
        if roles not in self.kept:
            # Contents so short that they also stand in the scaffolding would not be missed.
            self.template.turns([{"role": role, "content": f"content{i}{NUMBER}"} for i, role in enumerate(roles)])
            self.kept.add(roles)
        return self.template.turns(messages)

    def with_shots(self, example: Example, shots: list[Example]) -> Example:
        """The example after solved ones, as earlier turns of one conversation."""
        return Example(tuple(m for shot in shots for m in shot.messages) + example.messages, example.task)

    def _mark(self, text: str) -> str:
        return self.control.mark(text) if self.control else text

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
            end = len(ids) - ids[::-1].index(eos)
            return ids[:end], ids[end:]
        special = set(self.tokenizer.all_special_ids)
        return (ids, []) if any(i in special for i in ids[-2:]) else ([*ids, eos], [])

    def _pieces(self, example: Example) -> list[tuple[list[int], bool]]:
        """The conversation's tokens in order, in stretches that are supervised or not. Raises RowError."""
        length, most = sum(len(m["content"]) for m in example.messages), SPARE + CHARACTERS * self.max_length
        if length > most:
            raise RowError(
                f"its text has {length:,} characters, data.max_length = {self.max_length} allows {most:,}; "
                "shorten it, or take the row out"
            )
        pieces: list[tuple[list[int], bool]] = []
        for text, learnt in self.segments(example):
            # Chat templates write their special tokens themselves; plain text gets the tokenizer's opening token.
            ids = self._ids(text, add_special_tokens=not pieces and not self.chat)
            if learnt:
                turn, after = self._closed(ids)
                pieces += [(turn, True), (after, False)]
            else:
                pieces.append((ids, False))
        return pieces

    def prompt_ids(self, example: Example) -> list[int]:
        """Everything before the last assistant's turn, as it is given to the model to continue."""
        return [i for ids, _ in self._pieces(example)[:-2] for i in ids]

    def question_ids(self, text: str) -> list[int]:
        """A user's turn, ready to be answered. Raises DataError."""
        turns = ({"role": "user", "content": text}, {"role": "assistant", "content": "."})
        try:
            return self.prompt_ids(Example(turns, "question"))
        except RowError as error:
            raise DataError(f"prompt: {error}") from None

    def encode(self, example: Example) -> tuple[list[int], list[bool]]:
        """Token ids and supervision of the whole conversation, to the last turn's end token, not truncated."""
        pieces = self._pieces(example)[:-1]
        supervised = [learnt for ids, learnt in pieces for _ in ids]
        return [i for ids, _ in pieces for i in ids], supervised

    def encode_rows(self, examples: list[Example]) -> Encoded:
        """Rows over max_length lose their end; a row left without a supervised token is dropped and counted."""
        encoded = Encoded([], len(examples), 0, 0)
        for number, example in enumerate(examples, start=1):
            try:
                ids, supervised = self.encode(example)
            except RowError as error:
                raise DataError(f"task {example.task}: conversation {number}: {error}") from None
            cut = len(ids) > self.max_length
            ids, supervised = ids[: self.max_length], supervised[: self.max_length]
            if not any(supervised[1:]):
                encoded.dropped += 1
                continue
            encoded.truncated += cut
            row = EncodedRow(np.array(ids, dtype=np.int32), np.array(supervised), example.task)
            encoded.rows.append(row)
        return encoded


def _plain_segments(messages: list[Message]) -> list[tuple[str, bool]]:
    """Without a chat template: each given turn ends with a line break, each learnt one with the end token."""
    return [(m["content"] + ("" if m["role"] == "assistant" else "\n"), m["role"] == "assistant") for m in messages]


def load_examples(sources: list[Source]) -> tuple[list[Example], list[int]]:
    """Examples of all sources in order, and how many each source gave. Raises DataError with row numbers."""
    examples: list[Example] = []
    counts: list[int] = []
    for source in sources:
        rows = load_rows(source)
        for number, row in enumerate(rows, start=1):
            try:
                examples.append(to_example(row, source))
            except RowError as error:
                raise DataError(f"{source.path or source.reasoning_gym}: row {number}: {error}") from None
        counts.append(len(rows))
    return examples, counts
