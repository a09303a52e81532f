"""Added tokens of a fast tokenizer, and whether it was read as it was trained."""

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


def splits_its_words(tokenizer: Any) -> str | None:
    """A common word that is one token of the vocabulary and comes out in pieces: then its merges were lost.

    transformers 5.17 makes a Unigram tokenizer out of the SentencePiece vocabulary of Gemma's GGUF files, which has
    no merges ("▁st" "ring"), and one that takes letter by letter when it was saved and read again: a model that gets
    words it never saw, and no error. 5.24 reads both rightly.
    """
    for word in ("return", "string", "minimum", "number"):
        for space in ("\u2581", "\u0120"):  # a space, as SentencePiece and GPT-2's bytes spell it
            number = tokenizer.convert_tokens_to_ids(space + word)
            known = number is not None and number != tokenizer.unk_token_id
            if known and number not in tokenizer(f"the {word}", add_special_tokens=False)["input_ids"]:
                return word
    return None
