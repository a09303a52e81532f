"""A recipe's rows: what is trained on, what is held out, and in which order training sees them."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from remix_cli.data.batches import Plan
from remix_cli.data.encode import Encoded, Encoder, load_examples
from remix_cli.data.formats import Example
from remix_cli.errors import DataError
from remix_cli.recipe import Recipe

Row = TypeVar("Row")


@dataclass
class TrainingData:
    train: Encoded
    validation: Encoded
    plan: Plan
    overlap: int  # held-out conversations that are also trained on
    held_out: str  # digest_of the held-out conversations
    sources: list[Encoded]  # of `train`, one for each source

    def total_steps(self, recipe: Recipe) -> int:
        by_epochs = int(np.ceil(self.plan.steps_per_epoch * recipe.train.num_train_epochs))
        return recipe.train.max_steps or by_epochs


def split_examples(recipe: Recipe) -> tuple[list[Example], list[int], list[Example]]:
    """Training examples with their count per source, and held-out examples.

    Without `data.validation`, each source gives a share of its rows, the same ones for one seed.
    """
    examples, counts = load_examples(recipe.data.train)
    if recipe.data.validation:
        given, _ = load_examples(recipe.data.validation)
        seen = overlap(examples, given)
        if seen and not recipe.data.allow_overlap:
            raise DataError(
                f"data.validation: {seen} of {len(given)} rows are also in data.train, so the held-out loss would "
                "flatter; remove them, or set data.allow_overlap: true"
            )
        return examples, counts, evenly(given, recipe.data.validation_limit)
    seed = recipe.seed if recipe.data.split_seed is None else recipe.data.split_seed
    random = np.random.default_rng([seed, 1])
    total = sum(counts)
    share = min(recipe.data.validation_fraction, recipe.data.validation_limit / total)
    train: list[Example] = []
    held: list[Example] = []
    kept: list[int] = []
    start = 0
    for source, count in zip(recipe.data.train, counts, strict=True):
        out = set(random.permutation(count)[: round(count * share)].tolist())
        if len(out) == count:
            raise DataError(
                f"data.validation_fraction: {recipe.data.validation_fraction} holds out all {count} rows of "
                f"{source.named}; lower it"
            )
        train += [examples[start + i] for i in range(count) if i not in out]
        held += [examples[start + i] for i in sorted(out)]
        kept.append(count - len(out))
        start += count
    return train, kept, held


def overlap(train: list[Example], held: list[Example]) -> int:
    """How many held-out conversations are word for word in `train`."""
    known = {_words(example) for example in train}
    return sum(_words(example) in known for example in held)


def _words(example: Example) -> tuple[tuple[str, ...], ...]:
    """What each message says, by role; thinking and calls, where there are any, as JSON."""
    said: list[tuple[str, ...]] = []
    for message in example.messages:
        more = {key: value for key, value in message.items() if key not in ("role", "content", "learnt")}
        words = (message["role"], message["content"])
        said.append((*words, json.dumps(more, sort_keys=True)) if more else words)
    return tuple(said)


def digest_of(examples: list[Example]) -> str:
    """A hash of what the conversations say, whatever tokenizer and template they are read with."""
    return hashlib.sha256(json.dumps([_words(example) for example in examples]).encode()).hexdigest()


def evenly(rows: list[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows (None: all), spread evenly, so that every source keeps its share."""
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, limit).round().astype(int)]


def load_data(recipe: Recipe, tokenizer: Any, world: int = 1) -> TrainingData:
    """Read, hold out, tokenise and plan, for `world` processes. Raises DataError."""
    encoder = Encoder.of(tokenizer, recipe.data)
    examples, counts, held = split_examples(recipe)
    parts: list[Encoded] = []
    train = Encoded([], 0, 0, 0)
    start = 0
    for count in counts:
        part = encoder.encode_rows(examples[start : start + count])
        start += count
        parts.append(part)
        train.rows += part.rows
        train.read += part.read
        train.truncated += part.truncated
        train.dropped += part.dropped
        train.split += part.split
    for part, source in zip(parts, recipe.data.train, strict=True):
        if not part.rows:
            raise DataError(
                f"{source.named}: no row has a supervised token within "
                f"data.max_length = {recipe.data.max_length}; raise it"
            )
    if recipe.router.clusters > len(train.rows):
        raise DataError(
            f"router.clusters: {recipe.router.clusters} clusters need at least as many training rows, there are "
            f"{len(train.rows)}"
        )
    plan = Plan(
        lengths=train.lengths,
        counts=tuple(len(p.rows) for p in parts),
        weights=tuple(s.weight for s in recipe.data.train),
        rows_per_step=recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * world,
        group_by_length=recipe.train.group_by_length,
        seed=recipe.seed,
    )
    return TrainingData(train, encoder.encode_rows(held), plan, overlap(examples, held), digest_of(held), parts)
