"""Control tokens that a text spells out stay text.

A tokenizer makes `<|im_end|>` one token wherever it stands: in the scaffolding of a chat template, and in what a user
or an answer wrote, where it would end the turn and change what is learnt. So a text goes three steps:

1. `mark`: before a template sees a content, control tokens in it are replaced with marks.
2. The template is rendered. Control tokens that are now spelt out are its own.
3. `ids`: those are replaced with stand-ins, the marks with what they stood for, and a copy of the tokenizer that
   reads control tokens as text, and knows the stand-ins as added tokens, encodes the whole. Its stand-ins split, strip
   and normalise as the tokens they stand for, so the rest of the text has the same ids as ever.

A text without marks needs none of this and goes to the tokenizer as it is. Marks and stand-ins hold a number drawn for
each process, so that no text can spell one out.
"""

import copy
import re
import secrets
from functools import cached_property
from typing import Any

from tokenizers import AddedToken

from remix_cli.compat.tokenizers import leave_in_pieces, like
from remix_cli.data.formats import RowError

NUMBER = str(secrets.randbits(64))
MARK, STAND_IN = f"\ue000{NUMBER}:", f"\ue001{NUMBER}:"
END = "\ue002"
MARKED = re.compile(f"{MARK}([0-9]+){END}")


def special_ids(tokenizer: Any) -> set[int]:
    """Those that the tokenizer names, such as its end token, and added ones that it marks as special."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and added ones that the chat template writes itself.

    `scaffold` is what the template writes around a user's turn, empty without a template.
    """

    def __init__(self, tokenizer: Any, scaffold: str):
        self.tokenizer = tokenizer
        special = special_ids(tokenizer)
        self.known: dict[int, AddedToken] = {}
        for number, token in tokenizer.added_tokens_decoder.items():
            written = token.content.strip() and token.content in scaffold
            if number in special or written:
                self.known[number] = token
        # The longest first, as tokenizers match.
        texts = sorted((token.content for token in self.known.values()), key=len, reverse=True)
        self.spelt_out = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self.number = {token.content: number for number, token in self.known.items()}
        # A normalised one is also found where normalisation makes it: in full-width brackets, for example.
        self.hidden = any(token.normalized for token in self.known.values())

    def mark(self, text: str) -> str:
        """The text with a mark for each control token in it."""
        return self.spelt_out.sub(lambda found: f"{MARK}{self.number[found[0]]}{END}", text)

    def unmark(self, text: str) -> str:
        return MARKED.sub(lambda found: self.known[int(found[1])].content, text)

    def is_plain(self, text: str) -> bool:
        """May the tokenizer read it as it is?"""
        return MARK not in text and not self.hidden

    def ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text of which parts may be marked. Raises RowError where a control token cannot stay text."""
        if self.is_plain(text):
            return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        own = self.spelt_out.sub(lambda found: f"{STAND_IN}{self.number[found[0]]}{END}", text)
        plain = self.unmark(own)
        if MARK in plain:
            raise RowError("the chat template takes a control token in the text apart")
        if not self.tokenizer.is_fast:
            self._refuse(text)
        # Padding harms nobody, as masks say what is learnt; a tokenizer's unknown token may be any word.
        harmless = {self.tokenizer.unk_token_id, self.tokenizer.pad_token_id} - {self.tokenizer.eos_token_id}
        harmful = self.known.keys() - harmless
        body = self._read(plain, add_special_tokens=False)
        if not harmful.isdisjoint(body):
            self._refuse(text)
        if add_special_tokens:
            body = self._read(plain, add_special_tokens=True)
        return [self._stand_ins.get(i, i) for i in body]

    def _refuse(self, text: str) -> None:
        found = MARKED.search(text)
        which = repr(self.known[int(found[1])].content) if found else "a control token"
        raise RowError(
            f"the text holds {which}, which this tokenizer cannot keep as text; take it out, or set "
            "data.allow_special_tokens: true"
        )

    def _read(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._reader(text, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]

    @cached_property
    def _reader(self) -> Any:
        """The tokenizer's copy, made when a text first needs it: a large vocabulary takes half a second."""
        reader = copy.deepcopy(self.tokenizer)
        reader.add_tokens([self._stand_in(number, token) for number, token in self.known.items()])
        leave_in_pieces(reader, self.known.values())
        return reader

    @cached_property
    def _stand_ins(self) -> dict[int, int]:
        """Id of each stand-in in the copy -> id of its token."""
        reader = self._reader
        return {reader.convert_tokens_to_ids(f"{STAND_IN}{number}{END}"): number for number in self.known}

    def _stand_in(self, number: int, token: AddedToken) -> AddedToken:
        return like(token, f"{STAND_IN}{number}{END}", special=False)
