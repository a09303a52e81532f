"""Conversations to token ids, with the supervised ones marked.

Each stretch of text is tokenised by itself, the prompt exactly as it stands in front of the model when it
generates, so a token never straddles the border between what is given and what is learnt. The token that
ends the assistant's turn is supervised; supervision is an explicit mask, so a padding token that happens to
be the end token can neither hide it nor be learnt. What a text spells out is text, control tokens too (control.py).
"""

import json
from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import numpy as np

from remix_cli.data.control import NUMBER, ControlTokens, special_ids
from remix_cli.data.formats import Example, Message, RowError, question, to_example, without_mark
from remix_cli.data.formats.base import Conversation, in_column
from remix_cli.data.rows import NOTHING, Encoded, EncodedConversation, Packer
from remix_cli.data.sources import iterate_rows
from remix_cli.data.template import Template, writes_date
from remix_cli.data.turns import Part
from remix_cli.errors import DataError
from remix_cli.recipe.sources import Data, Source

# A longer text is refused: it takes a second for each million characters, most of it for tokens that are cut off, and
# where to cut before tokenising, so that the tokens in front stay the same, no tokenizer says.
SPARE, CHARACTERS = 1_000_000, 100  # at any length, and for each token of max_length
AT_ONCE = 256  # conversations, and no more than SPARE characters, unless one has more: many small calls are slow

Piece = tuple[list[int], bool]  # token ids, and whether they are supervised
Made = TypeVar("Made")
Known = dict[tuple[str, bool], list[int]]  # text, and whether special tokens are added -> its token ids


class Encoder:
    """Applies a tokenizer and its chat template, or plain text where there is none."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        use_chat_template: bool | None,
        allow_special_tokens: bool = False,
        template_settings: dict[str, Any] | None = None,
        template_date: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        if use_chat_template and not tokenizer.chat_template:
            raise DataError("data.use_chat_template: this tokenizer has no chat template; set it to false")
        if template_settings and not tokenizer.chat_template:
            raise DataError("data.chat_template_kwargs: this tokenizer has no chat template; leave them out")
        if template_date and not writes_date(tokenizer):
            raise DataError("data.template_date: this tokenizer has no chat template that writes a date; leave it out")
        self.chat = bool(tokenizer.chat_template) if use_chat_template is None else use_chat_template
        self.template: Template | None = None
        if tokenizer.chat_template:
            self.template = Template(tokenizer, template_settings or {}, template_date)
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
            data.template_date,
        )

    def parts(self, example: Example) -> list[list[Part]]:
        """The conversation's text as rows, each in stretches. Raises RowError.

        One row, but for chat templates that show earlier turns differently once later ones follow (turns.py). Control
        tokens of contents are marked in it.
        """
        (parts,) = self._parts([example])
        return parts

    def _parts(self, examples: list[Example]) -> Generator[list[list[Part]]]:
        """Of one example after another. Raises RowError when it is the turn of one that cannot be rendered."""
        rendered = self._rendered(self._marked_whole(example) for example in examples if self._is_chat(example))
        with closing(rendered):
            for example in examples:
                if self._is_chat(example):
                    yield next(rendered)
                elif _is_text(example):
                    yield [[Part(self._mark(example.messages[0]["content"]), True, True)]]
                else:
                    yield [_plain_parts(self._marked_whole(example))]

    def _is_chat(self, example: Example) -> bool:
        return self.chat and self.template is not None and not _is_text(example)

    def _rendered(self, conversations: Iterable[Conversation]) -> Generator[list[list[Part]]]:
        """By the template. Raises RowError also if it leaves something out of conversations of a form.

        Asked with texts of our own: short ones that also stand in the scaffolding would not be missed.
        """
        assert self.template is not None
        forms: deque[str] = deque()  # of those whose answer is still to come

        def questions() -> Iterator[tuple[Conversation, Conversation | None]]:
            for conversation in conversations:
                named = [_named(i, message) for i, message in enumerate(conversation.messages)]
                form = json.dumps(named) + str(len(conversation.tools))
                forms.append(form)
                yield conversation, None if form in self.kept else Conversation(named, conversation.tools)

        with closing(self.template.rows(questions())) as rendered:
            for rows in rendered:
                self.kept.add(forms.popleft())
                yield rows

    def with_shots(self, example: Example, shots: list[Example]) -> Example:
        """The example after solved ones, as earlier turns of one conversation."""
        messages: list[Message] = []
        for shot in shots:
            messages += shot.messages
        messages += example.messages
        return Example(tuple(messages), example.task, example.tools)

    def _mark(self, text: str) -> str:
        return self.control.mark(text) if self.control else text

    def _marked_whole(self, example: Example) -> Conversation:
        return Conversation(self._marked(list(example.messages)), self._marked(list(example.tools)))

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
        self._check_size(example)
        return self._tokens(example, self.parts(example), {})

    def _check_size(self, example: Example) -> None:
        length = _size_of(example)
        most = SPARE + CHARACTERS * self.max_length
        if length > most:
            raise RowError(
                f"its text has {length:,} characters, data.max_length = {self.max_length} allows {most:,}; "
                "shorten it, or take the row out"
            )

    def _tokens(self, example: Example, rows: list[list[Part]], known: Known) -> list[list[Piece]]:
        """Of what `_parts` made of an example. Raises RowError."""
        return [self._pieces(parts, self._opens(example), known) for parts in rows]

    def _opens(self, example: Example) -> bool:
        """Chat templates write their special tokens themselves; plain text gets the tokenizer's opening token."""
        return not self.chat or _is_text(example)

    def _pieces(self, parts: list[Part], opens: bool, known: Known) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            first = opens and not pieces
            ids = known.get((part.text, first)) or self._ids(part.text, add_special_tokens=first)
            if part.answer:
                turn, after = self._closed(ids)
                pieces += [(turn, part.learnt), (after, False)]
            else:
                pieces.append((ids, False))
        return pieces

    def _read_at_once(self, examples: list[Example], rows: list[list[list[Part]]]) -> Known:
        """The token ids of all stretches but those in which a control token is to stay text."""
        wanted: dict[tuple[str, bool], None] = {}  # in order
        for example, of_example in zip(examples, rows, strict=True):
            opens = self._opens(example)
            for parts in of_example:
                for number, part in enumerate(parts):
                    if self.control is None or self.control.is_plain(part.text):
                        wanted[part.text, opens and number == 0] = None
        known: Known = {}
        for first in (False, True):
            texts = [text for text, is_first in wanted if is_first == first]
            if texts:
                ids = self.tokenizer(texts, add_special_tokens=first)["input_ids"]
                known |= zip(((text, first) for text in texts), ids, strict=True)
        return known

    def prompt_ids(self, example: Example) -> list[int]:
        """Everything before the last assistant's turn, as it is given to the model to continue."""
        messages = [without_mark(message) for message in example.messages]
        *_, last = self._rows(Example(tuple(messages), example.task, example.tools))
        before = last[:-2]  # the last two: the turn, and what the template puts after it
        ids, _ = _joined(before)
        return ids

    def question_ids(self, text: str) -> list[int]:
        """A user's turn, ready to be answered. Raises DataError."""
        try:
            return self.prompt_ids(question(text))
        except RowError as error:
            raise DataError(f"prompt: {error}") from None

    def rows(self, example: Example) -> list[tuple[list[int], list[bool]]]:
        """Token ids and supervision of the conversation's rows, to the last turn's end token, not truncated."""
        return [_joined(pieces[:-1]) for pieces in self._rows(example)]

    def encode(self, example: Example) -> tuple[list[int], list[bool]]:
        """The last of its rows: the conversation as it stands at its end."""
        return self.rows(example)[-1]

    def encode_rows(self, examples: Iterable[Example]) -> Encoded:
        """Rows over max_length lose their end; a row left without a supervised token is dropped and counted.

        Raises DataError, which says where the row stands.
        """
        packer = Packer()
        for example, encoded in self.each(examples):
            packer.add(example, encoded)
        pack = packer.pack()
        return Encoded.of([(pack, np.arange(pack.conversations))])

    def each(
        self, examples: Iterable[Example], *, to_train: bool = False
    ) -> Iterator[tuple[Example, EncodedConversation]]:
        """One after another, as `encode_rows`; some are read ahead. `to_train`: nothing comes of those of weight 0."""
        first = 1
        for lot in _in_lots(examples):
            some = [example for example in lot if example.weight or not to_train]
            _each(some, map(self._check_size, some), first)
            parts = _each(some, self._parts(some), first)
            known = self._read_at_once(some, parts)
            tokens = (self._tokens(example, rows, known) for example, rows in zip(some, parts, strict=True))
            encoded = iter(_each(some, tokens, first))
            for example in lot:
                learnt = example.weight or not to_train
                yield example, self._cut(next(encoded)) if learnt else NOTHING
            first += len(lot)

    def _cut(self, rows: list[list[Piece]]) -> EncodedConversation:
        kept = []
        cut = 0
        for pieces in rows:
            ids, supervised = _joined(pieces[:-1])
            row = ids[: self.max_length], supervised[: self.max_length]
            if any(row[1][1:]):
                cut += len(ids) > self.max_length
                kept.append(row)
        return EncodedConversation(kept, cut, len(rows) - len(kept))


def _in_lots(examples: Iterable[Example]) -> Iterator[list[Example]]:
    lot: list[Example] = []
    size = 0
    for example in examples:
        lot.append(example)
        size += _size_of(example)
        if len(lot) == AT_ONCE or size > SPARE:
            yield lot
            lot, size = [], 0
    if lot:
        yield lot


def _each(examples: list[Example], made: Iterable[Made], first: int) -> list[Made]:
    """What is made of each example. Raises DataError for a RowError: it is about the example whose turn it was."""
    results: list[Made] = []
    try:
        for result in made:
            results.append(result)
    except RowError as error:
        example = examples[len(results)]
        where = example.origin or f"task {example.task}: conversation {first + len(results)}"
        raise DataError(f"{where}: {in_column(example.column, str(error))}") from None
    return results


def _joined(pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """All token ids, and of each whether it is supervised."""
    ids: list[int] = []
    supervised: list[bool] = []
    for piece, learnt in pieces:
        ids += piece
        supervised += [learnt] * len(piece)
    return ids, supervised


def _plain_parts(conversation: Conversation) -> list[Part]:
    """Without a chat template: each given turn ends with a line break, each learnt one with the end token.

    Raises RowError for what only a template can write.
    """
    parts = []
    for message in conversation.messages:
        for key in ("tool_calls", "reasoning_content"):
            if key in message:
                raise RowError(f"{key!r} needs a chat template, and this tokenizer has none or is not to use it")
        answer = message["role"] == "assistant"
        text = message["content"]
        parts.append(Part(text if answer else f"{text}\n", answer, answer and message.get("learnt", True)))
    if conversation.tools:
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


def _is_text(example: Example) -> bool:
    return example.messages[0]["role"] == "text"


def _size_of(example: Example) -> int:
    """Characters, roughly, where a turn holds more than its content."""
    size = 0
    for message in example.messages:
        size += len(message["content"]) + len(message.get("reasoning_content", ""))
        if "tool_calls" in message:
            size += len(json.dumps(message["tool_calls"]))
    return size


def load_examples(sources: list[Source]) -> tuple[list[Example], list[int]]:
    """Examples of all sources in order, and how many each source gave. Raises DataError with row numbers."""
    examples: list[Example] = []
    counts: list[int] = []
    for source in sources:
        before = len(examples)
        examples += iterate_examples(source)
        counts.append(len(examples) - before)
    return examples, counts


def iterate_examples(source: Source, wanted: Container[int] | None = None) -> Iterator[Example]:
    """Each read when it is asked for; of `wanted` rows, counted from 0, or of all.

    Raises DataError, which says where the row stands.
    """
    for number, (row, origin) in enumerate(iterate_rows(source)):
        if wanted is not None and number not in wanted:
            continue
        try:
            yield to_example(row, source, origin)
        except RowError as error:
            raise DataError(f"{origin}: {error}") from None
