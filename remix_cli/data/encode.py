"""Conversations to token ids, with the supervised ones marked.

Each stretch of text is tokenised by itself, the prompt exactly as it stands in front of the model when it
generates, so a token never straddles the border between what is given and what is learnt. The token that
ends the assistant's turn is supervised; supervision is an explicit mask, so a padding token that happens to
be the end token can neither hide it nor be learnt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from remix_cli.data.formats import Example, RowError, to_example
from remix_cli.data.sources import load_rows
from remix_cli.errors import DataError
from remix_cli.recipe.schema import Data, Source


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

    def __init__(self, tokenizer: Any, max_length: int, use_chat_template: bool | None):
        self.tokenizer = tokenizer
        self.max_length = max_length
        if use_chat_template and not tokenizer.chat_template:
            raise DataError("data.use_chat_template: this tokenizer has no chat template; set it to false")
        self.chat = bool(tokenizer.chat_template) if use_chat_template is None else use_chat_template

    @classmethod
    def of(cls, tokenizer: Any, data: Data) -> "Encoder":
        """As the recipe's `data` says."""
        return cls(tokenizer, data.max_length, data.use_chat_template)

    def segments(self, example: Example) -> list[tuple[str, bool]]:
        """The conversation's text in order, each stretch with whether it is supervised. Raises RowError."""
        messages = list(example.messages)
        if not self.chat:
            return _plain_segments(messages)
        parts: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            given = self._render(messages[:i], generate=True)
            whole = self._render(messages[: i + 1], generate=False)
            if not given.startswith(done) or not whole.startswith(given):
                raise RowError("the chat template renders earlier turns differently once later ones follow")
            parts += [(given[len(done) :], False), (whole[len(given) :], True)]
            done = whole
        return parts

    def with_shots(self, example: Example, shots: list[Example]) -> Example:
        """The example after solved ones, as earlier turns of one conversation."""
        return Example(tuple(m for shot in shots for m in shot.messages) + example.messages, example.task)

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # whatever the template's own code raises
            raise RowError(f"the chat template refuses the conversation: {error}") from None

    def _ids(self, text: str, first: bool) -> list[int]:
        """Chat templates write their special tokens themselves; plain text gets the tokenizer's opening token."""
        return self.tokenizer(text, add_special_tokens=first and not self.chat)["input_ids"]

    def _closed(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """An assistant's turn up to its end token, and what a template puts after it, which is not learnt."""
        eos = self.tokenizer.eos_token_id
        if eos in ids:
            end = len(ids) - ids[::-1].index(eos)
            return ids[:end], ids[end:]
        special = set(self.tokenizer.all_special_ids)
        return (ids, []) if any(i in special for i in ids[-2:]) else ([*ids, eos], [])

    def _pieces(self, example: Example) -> list[tuple[list[int], bool]]:
        """The conversation's tokens in order, in stretches that are supervised or not."""
        pieces: list[tuple[list[int], bool]] = []
        for text, learnt in self.segments(example):
            ids = self._ids(text, first=not pieces)
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
        """A user's turn, ready to be answered."""
        turns = ({"role": "user", "content": text}, {"role": "assistant", "content": "."})
        return self.prompt_ids(Example(turns, "question"))

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


def _plain_segments(messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
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
