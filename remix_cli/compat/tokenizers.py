"""Added tokens of a fast tokenizer."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken


def like(token: "AddedToken", content: str, *, special: bool) -> "AddedToken":
    """An added token of another text that splits, strips and normalises as `token` does."""
    from tokenizers import AddedToken

    return AddedToken(
        content,
        special=special,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
    )


def leave_in_pieces(tokenizer: Any, tokens: Iterable["AddedToken"]) -> None:
    """With `split_special_tokens=True` the fast `tokenizer` reads `tokens` as text from now on.

    That option of transformers is `encode_special_tokens` of the tokenizers library, which leaves in pieces only what
    the backend itself calls special (`AddedVocabulary`): an added token of a chat template that is not marked as such
    is one token all the same, wherever a text spells it out. Seen with transformers 5.24 and tokenizers 0.23.
    """
    tokenizer.backend_tokenizer.add_special_tokens([like(token, token.content, special=True) for token in tokens])
