"""Encoded rows as a few long arrays: a million of them as objects of lists would fill the memory.

Letters: N tokens, R rows, C conversations, each of which gave no row, one, or one for each turn.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np

from remix_cli.data.formats import Example
from remix_cli.data.said import DIGEST, digest

# Column -> type. Their sizes: tokens, learnt (N,); ends, targets (R,); digests (C * DIGEST,); the others (C,).
COLUMNS = {
    "tokens": np.dtype(np.int32),
    "learnt": np.dtype(np.bool_),  # is the token to be predicted?
    "ends": np.dtype(np.int64),  # where in `tokens` the row ends; the next one begins there
    "targets": np.dtype(np.int32),  # supervised tokens, the first one aside
    "rows": np.dtype(np.int32),  # of the conversation that were kept
    "cut": np.dtype(np.int32),  # of those, how many lost their end
    "dropped": np.dtype(np.int32),  # rows that lost everything supervised
    "tasks": np.dtype(np.int32),  # which of `task_names`
    "weights": np.dtype(np.float64),  # 0: not trained on
    "digests": np.dtype(np.uint8),  # of what the conversation says
}
IN_ARRAY = {"i4": "i", "i8": "q", "f8": "d", "b1": "b", "u1": "B"}  # numpy's types in array's letters
FLUSHED = 1 << 20  # tokens that are held back until they are written


@dataclass(frozen=True)
class EncodedRow:
    input_ids: np.ndarray  # (T,) int32
    supervised: np.ndarray  # (T,) bool: True where the token is to be predicted
    task: str
    weight: float = 1.0  # in training its token losses are multiplied by it


class EncodedConversation(NamedTuple):
    rows: list[tuple[list[int], list[bool]]]  # token ids, and whether each is supervised
    cut: int  # of these rows, how many lost their end
    dropped: int  # rows that lost everything supervised


NOTHING = EncodedConversation([], 0, 0)


@dataclass(frozen=True)
class Pack:
    """The rows of a list of conversations, in order."""

    columns: dict[str, np.ndarray]  # COLUMNS
    task_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.columns["ends"])

    @property
    def conversations(self) -> int:
        return len(self.columns["rows"])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, (R,) int64."""
        return np.diff(self.columns["ends"], prepend=0)

    @cached_property
    def conversation(self) -> np.ndarray:
        """Which conversation each row is of, (R,) int64."""
        return np.repeat(np.arange(self.conversations), self.columns["rows"])

    def rows_of(self, conversations: np.ndarray) -> np.ndarray:
        """The numbers of the rows of some conversations, in the order of these."""
        counts = self.columns["rows"]
        first = np.cumsum(counts, dtype=np.int64) - counts
        counts, first = counts[conversations], first[conversations]
        before = np.cumsum(counts, dtype=np.int64) - counts  # rows of the conversations in front
        return np.repeat(first - before, counts) + np.arange(counts.sum())

    def said(self, conversations: np.ndarray) -> list[bytes]:
        """The digests of some conversations, but for those of weight 0."""
        learnt = conversations[self.columns["weights"][conversations] > 0]
        return self.columns["digests"].view(f"V{DIGEST}")[learnt].tolist()

    def row(self, number: int) -> EncodedRow:
        """A view, nothing is copied."""
        ends = self.columns["ends"]
        place = slice(ends[number - 1] if number else 0, ends[number])
        conversation = self.conversation[number]
        return EncodedRow(
            self.columns["tokens"][place],
            self.columns["learnt"][place],
            self.task_names[self.columns["tasks"][conversation]],
            float(self.columns["weights"][conversation]),
        )


class Packer:
    """Makes a pack of one conversation after another, in memory or, once `write_to` is called, in files."""

    def __init__(self) -> None:
        self.waiting: dict[str, array[Any]] = {name: array(IN_ARRAY[kind.str[1:]]) for name, kind in COLUMNS.items()}
        self.task_numbers: dict[str, int] = {}
        self.files: dict[str, BinaryIO] = {}
        self.tokens = 0

    def add(self, example: Example, encoded: EncodedConversation) -> None:
        columns = self.waiting
        for ids, supervised in encoded.rows:
            columns["tokens"].extend(ids)
            columns["learnt"].extend(supervised)
            self.tokens += len(ids)
            columns["ends"].append(self.tokens)
            columns["targets"].append(sum(supervised[1:]))
        columns["rows"].append(len(encoded.rows))
        columns["cut"].append(encoded.cut)
        columns["dropped"].append(encoded.dropped)
        columns["tasks"].append(self.task_numbers.setdefault(example.task, len(self.task_numbers)))
        columns["weights"].append(example.weight)
        columns["digests"].frombytes(digest(example))
        if self.files and len(columns["tokens"]) > FLUSHED:
            self.flush()

    def write_to(self, folder: Path) -> None:
        """From now on into a file for each column, in `folder`. Close with `close`. Raises OSError."""
        for name in COLUMNS:
            self.files[name] = (folder / name).open("wb")
        self.flush()

    def flush(self) -> None:
        for name, file in self.files.items():
            self.waiting[name].tofile(file)
            del self.waiting[name][:]

    def close(self) -> None:
        """Write what is left. Raises OSError."""
        self.flush()
        for file in self.files.values():
            file.close()
        self.files = {}

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(self.task_numbers)

    def pack(self) -> Pack:
        """What was added, from memory."""
        columns = {name: np.asarray(self.waiting[name]).view(kind) for name, kind in COLUMNS.items()}
        return Pack(columns, self.task_names)


class Rows(Sequence[EncodedRow]):
    """Rows of one pack or several, each made when it is asked for."""

    def __init__(self, parts: Sequence[tuple[Pack, np.ndarray]]):
        """`parts`: packs, and of each the numbers of the rows."""
        self.packs = [pack for pack, _ in parts]
        self.pack = np.repeat(np.arange(len(parts)), [len(numbers) for _, numbers in parts])  # (rows,)
        self.number = _joined(numbers for _, numbers in parts)  # (rows,) in its pack
        self.lengths = _joined(pack.lengths[numbers] for pack, numbers in parts)  # (rows,) int64, tokens
        # (rows,) int64, supervised tokens, the first one aside
        self.target_counts = _joined(pack.columns["targets"][numbers] for pack, numbers in parts)
        weights = (pack.columns["weights"][pack.conversation[numbers]] for pack, numbers in parts)
        self.weights = _joined(weights, np.float64)  # (rows,)

    def __len__(self) -> int:
        return len(self.number)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[EncodedRow]: ...

    def __getitem__(self, index: int | slice) -> EncodedRow | list[EncodedRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.packs[self.pack[index]].row(self.number[index])


def _joined(parts: Iterable[np.ndarray], kind: type = np.int64) -> np.ndarray:
    return np.concatenate([np.empty(0, kind), *parts]).astype(kind, copy=False)


@dataclass
class Encoded:
    """Rows ready for batching, and what happened on the way."""

    rows: Rows
    read: int  # conversations
    truncated: int  # rows that lost their end
    dropped: int  # rows that lost all supervised tokens to truncation
    split: int  # conversations that became several rows
    left_out: int  # conversations of weight 0

    @classmethod
    def of(cls, parts: Sequence[tuple[Pack, np.ndarray]]) -> "Encoded":
        """Of packs, and of each the numbers of the conversations."""
        found = {"read": 0, "truncated": 0, "dropped": 0, "split": 0, "left_out": 0}
        rows = []
        for pack, conversations in parts:
            rows.append((pack, pack.rows_of(conversations)))
            some = {name: pack.columns[name][conversations] for name in ("rows", "cut", "dropped", "weights")}
            found["read"] += len(conversations)
            found["truncated"] += int(some["cut"].sum())
            found["dropped"] += int(some["dropped"].sum())
            found["split"] += int((some["rows"] + some["dropped"] > 1).sum())
            found["left_out"] += int((some["weights"] == 0).sum())
        return cls(Rows(rows), **found)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.rows.lengths

    @property
    def target_counts(self) -> np.ndarray:
        """Supervised tokens of each row; the first token has nothing before it to be predicted from."""
        return self.rows.target_counts

    @property
    def weights(self) -> np.ndarray:
        """What the token losses of each row are multiplied by in training."""
        return self.rows.weights

    @property
    def repeated(self) -> int:
        """Rows that say the same as an earlier one."""
        return len(self.rows) - len({_digest(row) for row in self.rows})

    def describe(self) -> str:
        notes = [f"{len(self.rows)} rows", f"{int(self.target_counts.sum()):,} supervised tokens"]
        if self.split:
            notes.append(f"{self.split} conversations as a row for each turn, as the chat template needs it")
        if self.truncated:
            notes.append(f"{self.truncated} cut at max_length")
        if self.dropped:
            notes.append(f"{self.dropped} dropped: nothing supervised before the cut")
        if self.left_out:
            notes.append(f"{self.left_out} left out: weight 0")
        return ", ".join(notes)


def _digest(row: EncodedRow) -> bytes:
    return hashlib.blake2b(row.input_ids.tobytes(), digest_size=DIGEST).digest()
