"""Rows from one source of the recipe, as plain dictionaries."""

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

from remix_cli.compat.datasets import say_nothing
from remix_cli.compat.reasoning_gym import seed_apart
from remix_cli.errors import DataError, shortened
from remix_cli.recipe.sources import LOADERS, Source, ending_of, is_pattern, named_locally


def check_source(source: Source, key: str) -> list[str]:
    """Problems that can be seen without reading rows: one line each, `key` being the source's place."""
    if source.path is None or not _looks_local(source.path):
        return []
    if "://" in source.path:
        return [f"{key}.path: {source.path}: addresses are not read; download the file and name it here"]
    if is_pattern(source.path):
        return _check_pattern(source.path, key)
    path = Path(source.path)
    if source.subset is not None:
        return [f"{key}.subset: is not read: it belongs to a hub data set, and {path} is a local folder; leave it out"]
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
        return [f"{key}.path: {path}: unknown ending; use one of {', '.join(LOADERS)}"]
    return []


def _check_pattern(pattern: str, key: str) -> list[str]:
    files = _matching(pattern)
    if not files:
        return [f"{key}.path: {pattern}: no file matches"]
    unknown = [file for file in files if not _is_data(file)]
    if unknown:
        return [f"{key}.path: {pattern}: {unknown[0]}: unknown ending; use one of {', '.join(LOADERS)}"]
    return []


def _matching(pattern: str) -> list[Path]:
    return [Path(place) for place in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(place)]


def _is_data(file: Path) -> bool:
    """By an ending that is read; parquet files are not packed again."""
    ending = ending_of(file.name)
    return ending in LOADERS and not (ending == ".parquet" and file.suffix != ".parquet")


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


def load_rows(source: Source) -> list[dict[str, Any]]:
    """All rows of `source`, in order. Raises DataError."""
    rows = _reasoning_gym_rows(source) if source.reasoning_gym else _path_rows(source)
    if source.limit is not None:
        rows = rows[: source.limit]
    if not rows:
        raise DataError(f"{source.path or source.reasoning_gym}: no rows")
    return rows


def _path_rows(source: Source) -> list[dict[str, Any]]:
    assert source.path is not None
    problems = check_source(source, "data")
    if problems:
        raise DataError(*problems)
    if not _looks_local(source.path):
        return _dataset_rows(source.path, name=source.subset, split=source.split)
    files = _matching(source.path) if is_pattern(source.path) else _files(Path(source.path), source.split)
    kind = LOADERS[ending_of(files[0].name)]
    _check_one_kind(source.path, files)
    if kind == "parquet":
        place = files[0] if len(files) == 1 else files[0].parent
        return _dataset_rows(kind, str(place), data_files=[str(file) for file in files], split="train")
    rows: list[dict[str, Any]] = []
    for file in files:
        if kind == "json":
            rows += _json_rows(file)
        elif kind == "text":
            rows += _text_rows(file)
        else:
            usual = "\t" if ending_of(file.name) == ".tsv" else ","
            rows += _csv_rows(file, source.separator or usual)
    return rows


def _check_one_kind(path: str, files: list[Path]) -> None:
    """Raises DataError for files of several kinds, which would hardly have the same columns."""
    if len({LOADERS[ending_of(file.name)] for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path}: files of several kinds ({shortened(names)}); name those of one")


def _dataset_rows(what: str, place: str | None = None, **options: Any) -> list[dict[str, Any]]:
    """Through the datasets library: a hub id, or parquet files."""
    import datasets

    say_nothing()
    try:
        rows = datasets.load_dataset(what, **options).to_list()
    except Exception as error:  # datasets raises its own, pyarrow's and the hub's errors
        cause = error.__cause__ or error
        lines = str(cause).strip().splitlines()
        reason = lines[0] if lines else type(cause).__name__
        raise DataError(f"{place or what}: cannot be read: {shortened(reason)}") from None
    return [_nested_without_nulls(row) for row in rows]


def _nested_without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A table has one type for a column, and fills in None for every key that another row has."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _text_rows(path: Path) -> list[dict[str, Any]]:
    """A row for each line that says something."""
    return [{"text": line} for line in _text_of(path).splitlines() if line.strip()]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines, or one JSON list of objects. Read here rather than by a table library, which would name no
    line and fill in columns that a row does not have."""
    text = _text_of(path)
    if text.lstrip().startswith("["):
        rows = _json(text, f"{path}")
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                rows.append(_json(line, f"{path}: line {number}"))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: should be an object of columns, is {type(row).__name__}")
    return rows


def _csv_rows(path: Path, separator: str) -> list[dict[str, Any]]:
    """Every cell is text, as it stands in the file. A table library would make numbers of `007`, nothing of `NA`, and
    would take the first of three cells under two names for a row's number."""
    rows: list[dict[str, Any]] = []
    csv.field_size_limit(MAX_CELL)
    try:
        reader = csv.reader(io.StringIO(_text_of(path), newline=""), delimiter=separator, strict=True)
        names = next(reader, [])
        other = next((mark for mark in OTHER_SEPARATORS if len(names) == 1 and mark in names[0]), None)
        if other is not None:
            raise DataError(f"{path}: the first line names one column, {names[0]!r}; set separator: {other!r}")
        twice = _first_repeated(names)
        if twice is not None:
            raise DataError(f"{path}: column {twice!r} stands twice in the first line")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}: line {reader.line_num}: {len(cells)} cells under {len(names)} names; put text that "
                    "holds a comma in double quotes"
                )
            rows.append(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not CSV: {error}") from None
    return rows


def _first_repeated(names: list[str]) -> str | None:
    """The first of `names` that stood before."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


MAX_CELL = 2**31 - 1
OTHER_SEPARATORS = (";", "\t", "|")


def _text_of(path: Path) -> str:
    """Raises DataError."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}: not a whole gzip file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line}: not UTF-8") from None


def _json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = _first_repeated([key for key, _ in pairs])
        if twice is not None:
            raise DataError(f"{where}: key {twice!r} stands twice in one object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20].strip()
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: not JSON ({at}column {error.colno}: {error.msg}) near {near!r:.80}") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: not JSON that can be read: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: not JSON that can be read: nested too deeply") from None


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


def _reasoning_gym_rows(source: Source) -> list[dict[str, Any]]:
    made = reasoning_gym_dataset(source)
    try:
        return [{"prompt": entry["question"], "completion": str(entry["answer"])} for entry in made]
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"reasoning_gym {source.reasoning_gym!r}: {error}") from None
