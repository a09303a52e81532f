"""Rows from one source of the recipe, one after another, as plain dictionaries, each with where it stands."""

import glob
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from remix_cli.compat.datasets import say_nothing
from remix_cli.compat.reasoning_gym import seed_apart
from remix_cli.data.files import first_line, rows_in, without_nulls
from remix_cli.data.formats import Origin, Row
from remix_cli.errors import DataError, shortened
from remix_cli.recipe.sources import LOADERS, OF_HUB, Source, ending_of, is_pattern, named_locally


def check_source(source: Source, key: str) -> list[str]:
    """Problems that can be seen without reading rows: one line each, `key` being the source's place."""
    problems = []
    for path in source.paths:
        problems += _check_path(path, source, key)
    if not problems and len(source.paths) > 1:
        problems += _check_named_once(source, key)
    return problems


def _check_path(name: str, source: Source, key: str) -> list[str]:
    if not _looks_local(name):
        if len(source.paths) > 1:
            return [f"{key}.path: {name}: a list names local files, and there is none of this name"]
        return []
    if "://" in name:
        return [f"{key}.path: {name}: addresses are not read; download the file and name it here"]
    if is_pattern(name):
        return _check_pattern(name, key)
    path = Path(name)
    for of_hub in OF_HUB:
        if getattr(source, of_hub):
            return [f"{key}.{of_hub}: is not read: it belongs to a hub data set, and {path} is local; leave it out"]
    if path.is_dir():
        below = _below(path)
        if below is not None:
            return [
                f"{key}.path: {path}: {below.relative_to(path)} lies in a sub-folder, and those are not read; name the "
                "folder that holds the files, or each in a source of its own"
            ]
        if any(_is_data(file) for file in path.iterdir()):
            return []
        return [f"{key}.path: {path}: no {', '.join(LOADERS)} file in this folder"]
    if not path.exists():
        return [f"{key}.path: {path}: no such file"]
    if not path.is_file():
        return [f"{key}.path: {path}: not a regular file"]
    if not _is_data(path):
        return [f"{key}.path: {path}: {_not_read(path)}"]
    return []


def _check_pattern(pattern: str, key: str) -> list[str]:
    files = _matching(pattern)
    if not files:
        return [f"{key}.path: {pattern}: no file matches"]
    unknown = [file for file in files if not _is_data(file)]
    if unknown:
        return [f"{key}.path: {pattern}: {unknown[0]}: {_not_read(unknown[0])}"]
    return []


def _matching(pattern: str) -> list[Path]:
    return [Path(place) for place in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(place)]


def _is_data(file: Path) -> bool:
    """By an ending that is read; parquet files are not packed again."""
    ending = ending_of(file.name)
    return ending in LOADERS and not (ending == ".parquet" and file.suffix != ".parquet")


def _not_read(file: Path) -> str:
    if ending_of(file.name) == ".parquet":
        return "parquet packs itself; unpack the file with gunzip"
    return f"unknown ending; use one of {', '.join(LOADERS)}, or these with .gz"


def _below(folder: Path) -> Path | None:
    """The first data file in a sub-folder, hidden ones aside: whoever names `folder` may mean it."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # what os.walk goes on with
        if Path(place) == folder:
            continue
        for name in sorted(files):
            if ending_of(name) in LOADERS:
                return Path(place) / name
    return None


def _looks_local(path: str) -> bool:
    return Path(path).exists() or named_locally(path)


def _check_named_once(source: Source, key: str) -> list[str]:
    """Whoever lists a file and a pattern that it matches would read its rows twice."""
    seen = set()
    for file in itertools.chain.from_iterable(_files_named(path, source.split) for path in source.paths):
        if file in seen:
            return [f"{key}.path: names {file} twice; for rows that count more, set weight"]
        seen.add(file)
    return []


def load_rows(source: Source) -> list[Row]:
    """All rows of `source`, in order. Raises DataError."""
    return [row for row, _ in iterate_rows(source)]


def iterate_rows(source: Source) -> Iterator[tuple[Row, Origin]]:
    """The rows of `source`, in order, each read when it is asked for. Raises DataError, also where there is none."""
    rows = _reasoning_gym_rows(source) if source.reasoning_gym else _path_rows(source)
    none = True
    for row, origin in itertools.islice(rows, source.limit):
        none = False
        yield row, origin
    if none:
        raise DataError(f"{source.named}: no rows")


def count_rows(source: Source) -> int:
    """How many rows `iterate_rows` gives. Raises DataError."""
    if source.reasoning_gym:
        return min(source.size, source.limit or source.size)
    return sum(1 for _ in iterate_rows(source))


def files_of(source: Source) -> list[Path] | None:
    """What holds its rows, in order, nothing for rows that are made; None if no file is kept. Raises DataError."""
    files: list[Path] = []
    for path in source.paths:
        if _looks_local(path):
            files += _files_named(path, source.split)
        elif source.streaming:
            return None
        else:
            files += [Path(part["filename"]) for part in _hub_table(path, source).cache_files]
    return files if files or source.reasoning_gym else None


def _path_rows(source: Source) -> Iterator[tuple[Row, Origin]]:
    problems = check_source(source, "data")
    if problems:
        raise DataError(*problems)
    for path in source.paths:
        if not _looks_local(path):
            yield from _numbered(_hub_rows(path, source), path)
            continue
        for file in _files_named(path, source.split):
            yield from _numbered(rows_in(file, source.separator), str(file))


def _numbered(rows: Iterator[Row], place: str) -> Iterator[tuple[Row, Origin]]:
    for number, row in enumerate(rows, start=1):
        yield row, Origin(place, number)


def _files_named(path: str, split: str) -> list[Path]:
    """Raises DataError for files of several kinds, which would hardly have the same columns."""
    files = _matching(path) if is_pattern(path) else _files(Path(path), split)
    if len({LOADERS[ending_of(file.name)] for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path}: files of several kinds ({shortened(names)}); name those of one")
    return files


def _hub_rows(path: str, source: Source) -> Iterator[Row]:
    with _as_data_error(path):
        yield from map(without_nulls, _hub_table(path, source))


def _hub_table(path: str, source: Source) -> Any:
    """Through the datasets library, which keeps a table on disk; `streaming`, nothing is kept. Raises DataError."""
    import datasets

    say_nothing()
    with _as_data_error(path):
        return datasets.load_dataset(
            path, name=source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )


@contextmanager
def _as_data_error(path: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # datasets raises its own, pyarrow's and the hub's errors
        raise DataError(f"{path}: cannot be read: {first_line(error.__cause__ or error)}") from None


SPLITS = ("train", "validation", "valid", "dev", "test")


def _files(path: Path, split: str) -> list[Path]:
    """The files of a local source. In a folder: those named after the split, or all if none is named after any.

    Raises DataError rather than read another split's rows, or files of several kinds, or leave out what may be meant.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if ending_of(file.name) in LOADERS)
    for file in files:
        if file.suffix != file.suffix.lower():
            raise DataError(f"{path}: {file.name}: the ending is not read in capitals; rename the file")
    named = [file for file in files if _stem(file).split("-")[0] == split]
    if named:
        _check_beside(named, files, split)
    else:
        others = [file.name for file in files if _names_any_split(file)]
        if others:
            raise DataError(f"{path}: no file named {split}; it holds {', '.join(others)}: name one file, or set split")
    return named or files


def _stem(file: Path) -> str:
    """The name without its endings: `train` of `train.jsonl.gz`."""
    return Path(file.name.removesuffix(".gz")).stem


def _names_any_split(file: Path) -> bool:
    """Anywhere in its name."""
    return any(split in _stem(file).lower() for split in SPLITS)


def _check_beside(named: list[Path], files: list[Path], split: str) -> None:
    """Raises DataError for a file of the same kind beside those of the split whose name says no other split."""
    kinds = {ending_of(file.name) for file in named}
    other_splits = set(SPLITS) - {split}
    for file in files:
        if file in named or ending_of(file.name) not in kinds:
            continue
        words = set(re.split(r"[^a-z]+", _stem(file).lower()))
        if not words & other_splits:
            first = named[0]
            raise DataError(
                f"{first.parent}: {first.name} is the split {split}, but what {file.name} is for, its name does not "
                f"say; name one file, or call the other {split}-2{first.suffix}"
            )


def reasoning_gym_dataset(source: Source) -> Any:
    """The package's data set of a source: entries, and their verifier. Raises DataError."""
    try:
        import reasoning_gym
    except ImportError:
        raise DataError("reasoning_gym: not installed; pip install 'remix-cli[demo]'") from None
    seed = seed_apart(source.seed)
    try:
        return reasoning_gym.create_dataset(source.reasoning_gym, size=source.size, seed=seed, **source.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"reasoning_gym {source.reasoning_gym!r}: {error}") from None


def _reasoning_gym_rows(source: Source) -> Iterator[tuple[Row, Origin]]:
    made = reasoning_gym_dataset(source)
    try:
        rows = ({"prompt": entry["question"], "completion": str(entry["answer"])} for entry in made)
        yield from _numbered(rows, source.named)
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"reasoning_gym {source.reasoning_gym!r}: {error}") from None
