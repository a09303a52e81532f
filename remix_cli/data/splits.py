"""A recipe's rows: what is trained on, what is held out, and in which order training sees them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from remix_cli.data.batches import Plan
from remix_cli.data.cache import Remembering, encode_source
from remix_cli.data.encode import Encoder, iterate_examples
from remix_cli.data.formats import Example
from remix_cli.data.rows import Encoded
from remix_cli.data.said import digest, digest_of, overlap
from remix_cli.data.sources import count_rows
from remix_cli.errors import DataError
from remix_cli.recipe import Recipe
from remix_cli.recipe.sources import Source

Row = TypeVar("Row")


@dataclass
class TrainingData:
    train: Encoded
    validation: Encoded
    plan: Plan
    overlap: int  # held-out conversations that are also trained on
    held_out: str  # digest_of the held-out conversations
    sources: list[Encoded]  # of `train`, one for each source
    held_out_of: list[int]  # conversations cut from each source

    def total_steps(self, recipe: Recipe) -> int:
        by_epochs = int(np.ceil(self.plan.steps_per_epoch * recipe.train.num_train_epochs))
        return recipe.train.max_steps or by_epochs


@dataclass(frozen=True)
class Conversations:
    """Those of one source: how many there are, and what they say if they are at hand."""

    source: Source
    count: int
    at_hand: list[Example] | None = None

    def some(self, numbers: np.ndarray) -> list[Example]:
        """Those of these numbers, ascending from 0; a weight of 0 leaves one out. Raises DataError."""
        if self.at_hand is not None:
            found = [self.at_hand[number] for number in numbers]
        else:
            wanted = set(numbers.tolist())
            found = list(itertools.islice(iterate_examples(self.source, wanted), len(wanted)))
        if len(found) < len(numbers):
            raise DataError(f"{self.source.named}: changed while it was read; start again")
        return [example for example in found if example.weight]


def held_out_examples(recipe: Recipe) -> list[Example]:
    """What the recipe holds out of training. Raises DataError."""
    if recipe.data.validation:
        return _of_validation(recipe, _counted(recipe.data.validation))
    sources = _counted(recipe.data.train)
    return _of_each(sources, _cut_from_train(recipe, sources))


def training_examples(recipe: Recipe, limit: int) -> list[Example]:
    """At most `limit` of the conversations that the recipe trains on, spread evenly over all. Raises DataError."""
    sources = _counted(recipe.data.train)
    kept = _trained_on(sources, _cut_from_train(recipe, sources))
    starts = _starts(sources)
    everything = np.concatenate([numbers + start for numbers, start in zip(kept, starts, strict=True)])
    return _of_each(sources, _by_source(everything[spread(len(everything), limit)], sources))


def _counted(sources: list[Source]) -> list[Conversations]:
    return [Conversations(source, count_rows(source)) for source in sources]


def _of_validation(recipe: Recipe, sources: list[Conversations]) -> list[Example]:
    total = sum(source.count for source in sources)
    return _of_each(sources, _by_source(spread(total, recipe.data.validation_limit), sources))


def _cut_from_train(recipe: Recipe, sources: list[Conversations]) -> list[np.ndarray]:
    """The numbers of the held-out conversations of each training source, ascending: none beside `data.validation`.

    Each source gives a share of its rows, the same ones for one seed. Raises DataError.
    """
    data = recipe.data
    if data.validation:
        return [np.empty(0, dtype=int) for _ in sources]
    random = np.random.default_rng([recipe.seed if data.split_seed is None else data.split_seed, 1])
    sizes = _held_out_sizes([source.count for source in sources], data.validation_fraction, data.validation_limit)
    held = []
    for one, size in zip(sources, sizes, strict=True):
        out = random.permutation(one.count)[:size]
        if len(out) == one.count:
            raise DataError(
                f"data.validation_fraction: {data.validation_fraction} holds out all {one.count} rows of "
                f"{one.source.named}; lower it"
            )
        held.append(np.sort(out))
    return held


def _held_out_sizes(counts: list[int], fraction: float, limit: int) -> list[int]:
    """How many rows each source of `counts` rows gives: alike shares, about `limit` rows together at most.

    Where every share is less than half a row, the largest sources give one each, so that something is held out.
    """
    total = sum(counts)
    share = min(fraction, limit / total)
    sizes = [round(count * share) for count in counts]
    if share > 0 and not any(sizes):
        largest = sorted(range(len(counts)), key=lambda i: -counts[i])
        for i in largest[: max(1, round(total * share))]:
            sizes[i] = min(1, counts[i] - 1)
    return sizes


def _trained_on(sources: list[Conversations], held: list[np.ndarray]) -> list[np.ndarray]:
    """The numbers of each source's other conversations, ascending."""
    kept = []
    for source, out in zip(sources, held, strict=True):
        others = np.ones(source.count, dtype=bool)
        others[out] = False
        kept.append(np.flatnonzero(others))
    return kept


def _of_each(sources: list[Conversations], numbers: list[np.ndarray]) -> list[Example]:
    found: list[Example] = []
    for source, some in zip(sources, numbers, strict=True):
        found += source.some(some)
    return found


def _starts(sources: list[Conversations]) -> np.ndarray:
    """Where each source begins among the conversations of all."""
    return np.cumsum([0, *(source.count for source in sources[:-1])])


def _by_source(numbers: np.ndarray, sources: list[Conversations]) -> list[np.ndarray]:
    """Numbers among the conversations of all sources, ascending, as numbers in each."""
    starts = _starts(sources)
    parts = np.split(numbers, np.searchsorted(numbers, starts[1:]))
    return [part - start for part, start in zip(parts, starts, strict=True)]


def spread(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of the numbers below `count` (None: all), spread evenly."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).round().astype(int)


def evenly(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows (None: all), spread evenly, so that every source keeps its share."""
    return [rows[i] for i in spread(len(rows), limit)]


def load_data(recipe: Recipe, tokenizer: Any, world: int = 1) -> TrainingData:
    """Read, hold out, tokenise and plan, for `world` processes. Raises DataError, StorageError."""
    encoder = Encoder.of(tokenizer, recipe.data)
    given, said = _read_validation(recipe)
    packs, sources = [], []
    for source in recipe.data.train:
        pack, at_hand = encode_source(source, encoder, recipe.data)
        packs.append(pack)
        sources.append(Conversations(source, pack.conversations, at_hand))
    out = _cut_from_train(recipe, sources)
    parts = list(zip(packs, _trained_on(sources, out), strict=True))
    trained_on = set(itertools.chain.from_iterable(pack.said(numbers) for pack, numbers in parts))
    if given:
        _check_overlap(recipe, trained_on, said)
    held = _of_validation(recipe, given) if given else _of_each(sources, out)
    train = Encoded.of(parts)
    each = [Encoded.of([part]) for part in parts]
    _check_enough(recipe, train, each)
    plan = Plan(
        lengths=train.lengths,
        counts=tuple(len(one.rows) for one in each),
        weights=tuple(s.weight for s in recipe.data.train),
        rows_per_step=recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * world,
        group_by_length=recipe.train.group_by_length,
        seed=recipe.seed,
    )
    also = overlap(trained_on, map(digest, held))
    return TrainingData(train, encoder.encode_rows(held), plan, also, digest_of(held), each, list(map(len, out)))


def _read_validation(recipe: Recipe) -> tuple[list[Conversations], list[bytes]]:
    """`data.validation`, and the digest of each of its conversations. Raises DataError."""
    sources: list[Conversations] = []
    said: list[bytes] = []
    for source in recipe.data.validation:
        examples = Remembering(iterate_examples(source))
        said += map(digest, examples)
        sources.append(Conversations(source, examples.count, examples.all))
    return sources, said


def _check_overlap(recipe: Recipe, trained_on: set[bytes], given: list[bytes]) -> None:
    seen = overlap(trained_on, given)
    if seen and not recipe.data.allow_overlap:
        raise DataError(
            f"data.validation: {seen} of {len(given)} rows are also in data.train, so the held-out loss would "
            "flatter; remove them, or set data.allow_overlap: true"
        )


def _check_enough(recipe: Recipe, train: Encoded, each: list[Encoded]) -> None:
    """Raises DataError for a source that teaches nothing, and for fewer rows than clusters."""
    for encoded, source in zip(each, recipe.data.train, strict=True):
        if encoded.left_out == encoded.read:
            raise DataError(f"{source.named}: every row has weight 0, so there is nothing to learn")
        if not encoded.rows:
            raise DataError(
                f"{source.named}: no row has a supervised token within data.max_length = {recipe.data.max_length}; "
                "raise it"
            )
    if recipe.router.clusters > len(train.rows):
        raise DataError(
            f"router.clusters: {recipe.router.clusters} clusters need at least as many training rows, there are "
            f"{len(train.rows)}"
        )
