"""Encoded rows kept on disk: to tokenise a million takes minutes, to map them into memory no time at all.

A source that gives many tokens is kept in a folder of its own, named by a hash of all that its rows depend on: the
contents of its files, what the recipe says of it and of encoding, the tokenizer and its template, the versions of the
libraries, our own code. So nothing that is kept can be stale, and any of it may be removed at any time. Of several
processes that need the same rows one encodes them, the others wait.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from remix_cli.data.encode import Encoder, iterate_examples
from remix_cli.data.formats import Example
from remix_cli.data.formats.registry import FORMATS
from remix_cli.data.rows import COLUMNS, EncodedConversation, Pack, Packer
from remix_cli.data.sources import files_of
from remix_cli.data.template import writes_date
from remix_cli.errors import ArtefactError, BusyError, DataError, StorageError
from remix_cli.recipe.sources import Data, Source
from remix_cli.storage import is_sealed, publish_folder, seal, sha256, write_json
from remix_cli.stored_json import Document, read_object

KEPT = 1_000_000  # tokens: fewer are encoded in seconds, and nothing is written
AT_HAND = 10_000  # conversations that are remembered as they were read
WAIT = 1.0  # seconds, for another process that writes the same
MANIFEST = "manifest.json"
# Keys of `data` that say which rows are used, not how they are encoded.
OF_THE_SPLIT = {"train", "validation", "validation_fraction", "validation_limit", "split_seed", "allow_overlap"}
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
CODE = ("data/**/*.py", "compat/*.py", "recipe/sources.py")


class Remembering:
    """Passes examples on and remembers them, until there are too many."""

    def __init__(self, examples: Iterable[Example]):
        self.examples = examples
        self.first: list[Example] = []
        self.count = 0
        self.ended = False

    def __iter__(self) -> Iterator[Example]:
        for example in self.examples:
            self.count += 1
            if self.count <= AT_HAND:
                self.first.append(example)
            yield example
        self.ended = True

    @property
    def all(self) -> list[Example] | None:
        """None if there were too many, or not all were read."""
        return self.first if self.ended and self.count <= AT_HAND else None


def encode_source(source: Source, encoder: Encoder, data: Data) -> tuple[Pack, list[Example] | None]:
    """The rows of a source to train on, from disk if they are kept there; and its conversations, if they are at hand.

    Raises DataError, StorageError.
    """
    contents = contents_of(source)
    place = _place_of(source, contents, encoder.tokenizer, data)
    if place is not None:
        kept = read_pack(place)
        if kept is not None:
            return kept, None
    examples = Remembering(iterate_examples(source))
    encoded = encoder.each(examples, to_train=True)
    packer = Packer()
    for example, conversation in encoded:
        packer.add(example, conversation)
        if packer.tokens >= KEPT and place is not None and _can_write(place.parent):
            return _keep(place, contents, source, packer, encoded), examples.all
    return packer.pack(), examples.all


def _keep(
    place: Path,
    contents: list[str] | None,
    source: Source,
    packer: Packer,
    more: Iterator[tuple[Example, EncodedConversation]],
) -> Pack:
    """What the packer has and `more` gives, on disk; or what another process has put there meanwhile."""
    kept = read_pack(place)
    while kept is None:
        try:
            with publish_folder(place, replace=True) as scratch:
                packer.write_to(scratch)
                for example, conversation in more:
                    packer.add(example, conversation)
                packer.close()
                if contents_of(source) != contents:
                    raise DataError(f"{source.named}: changed while it was read; start again")
                _write_manifest(scratch, source, packer)
        except BusyError:
            time.sleep(WAIT)
            kept = read_pack(place)
        else:
            kept = read_pack(place)
            if kept is None:
                raise StorageError(
                    f"{place}: is not what was written there; set REMIX_CACHE to a folder on another disk"
                )
    return kept


def _write_manifest(folder: Path, source: Source, packer: Packer) -> None:
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in COLUMNS}
    manifest = {"source": source.named, "tokens": packer.tokens, "task_names": packer.task_names, "files": files}
    write_json(folder / MANIFEST, seal(manifest))


def read_pack(folder: Path) -> Pack | None:
    """What is kept there, mapped into memory; None if it is not there, or not as it was written."""
    try:
        manifest = read_object(folder / MANIFEST)
        if not is_sealed(manifest) or not all(_is_whole(folder / name, manifest["files"][name]) for name in COLUMNS):
            return None
        columns = {name: np.asarray(np.memmap(folder / name, kind, "r")) for name, kind in COLUMNS.items()}
    except (ArtefactError, OSError, KeyError):
        return None
    return Pack(columns, tuple(manifest["task_names"]))


def _is_whole(file: Path, written: Document) -> bool:
    return file.stat().st_size == written["bytes"] and sha256(file) == written["sha256"]


def cache_folder() -> Path | None:
    """Where encoded rows are kept; None where the environment says that none are to be."""
    asked = os.environ.get("REMIX_CACHE")
    if asked == "off":
        return None
    if asked:
        return Path(asked).expanduser() / "rows"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "remix" / "rows"


def _can_write(folder: Path) -> bool:
    """In some places nothing can be kept, and rows are encoded in memory instead."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def contents_of(source: Source) -> list[str] | None:
    """A hash of each file that holds its rows; None where no file tells what they are. Raises DataError."""
    files = files_of(source)
    if files is None:
        return None
    try:
        return [f"{file.name} {sha256(file)}" for file in files]
    except OSError:  # whoever reads the rows will say so
        return None


def _place_of(source: Source, contents: list[str] | None, tokenizer: Any, data: Data) -> Path | None:
    """Where the rows of a source are kept; None if they are not, for what they depend on cannot be told."""
    folder = cache_folder()
    read_by = _state_of(tokenizer, data.template_date)
    own = FORMATS[source.format].where.startswith("remix_cli.data.formats.")
    if folder is None or contents is None or read_by is None or not own:
        return None
    libraries = [*LIBRARIES, "reasoning_gym"] if source.reasoning_gym else LIBRARIES
    depends_on = {
        "contents": contents,
        "source": source.model_dump(exclude={"path", "weight"}),
        "data": data.model_dump(exclude=OF_THE_SPLIT),
        "tokenizer": read_by,
        "versions": [sys.version, *map(version, libraries)],
        "code": _hash_of_code(),
        "columns": {name: kind.str for name, kind in COLUMNS.items()},  # of this machine's byte order
    }
    text = json.dumps(depends_on, sort_keys=True)
    return folder / hashlib.sha256(text.encode()).hexdigest()[:32]


def _state_of(tokenizer: Any, day: str | None) -> list[Any] | None:
    """All that its reading of a text depends on; None for one that runs code of its own, which cannot be told."""
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    template = tokenizer.chat_template or ""
    place = {"name_or_path", "is_local", "local_files_only", "vocab_file"}
    settings = {key: repr(value) for key, value in tokenizer.init_kwargs.items() if key not in place}
    today = day or (str(date.today()) if writes_date(tokenizer) else "")
    names = [tokenizer.special_tokens_map, tokenizer.all_special_ids, tokenizer.eos_token_id]
    return [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), template, settings, names, today]


def _hash_of_code() -> str:
    """Of what reads and encodes rows: whoever changes it need not think of what is kept."""
    package = Path(__file__).parents[1]
    files = sorted(file for pattern in CODE for file in package.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
