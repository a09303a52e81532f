"""What conversations say, whatever tokenizer and template they are read with: do two say the same?"""

import hashlib
import json
from collections.abc import Iterable

from remix_cli.data.formats import Example

DIGEST = 16  # bytes


def digest(example: Example) -> bytes:
    """Equal for conversations that are word for word the same, DIGEST bytes."""
    return hashlib.blake2b(json.dumps(_words(example)).encode(), digest_size=DIGEST).digest()


def digest_of(examples: list[Example]) -> str:
    """A hash of what the conversations say, in their order."""
    return hashlib.sha256(json.dumps([_words(example) for example in examples]).encode()).hexdigest()


def overlap(train: set[bytes], held: Iterable[bytes]) -> int:
    """How many held-out conversations are word for word in `train`, by their digests."""
    return sum(one in train for one in held)


def _words(example: Example) -> tuple[tuple[str, ...], ...]:
    """What each message says, by role; thinking and calls, where there are any, as JSON."""
    said: list[tuple[str, ...]] = []
    for message in example.messages:
        more = {key: value for key, value in message.items() if key not in ("role", "content", "learnt")}
        words = (message["role"], message["content"])
        said.append((*words, json.dumps(more, sort_keys=True)) if more else words)
    return tuple(said)
