"""Rows from a file, one after another, as plain dictionaries. A file is never held whole, but for one JSON list."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from remix_cli.errors import DataError, shortened
from remix_cli.recipe.sources import LOADERS, ending_of

MAX_CELL = 2**31 - 1
OTHER_SEPARATORS = (";", "\t", "|")
ROWS_AT_ONCE = 1000  # of a table


def rows_in(path: Path, separator: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file by its ending. `separator`: between the cells of a csv or tsv file.

    Raises DataError, which names the line or the row.
    """
    ending = ending_of(path.name)
    kind = LOADERS[ending]
    if kind == "parquet":
        return _parquet_rows(path)
    if kind == "json":
        return _text_file(path, lambda text: _json_rows(text, path))
    if kind == "csv":
        usual = "\t" if ending == ".tsv" else ","
        return _text_file(path, lambda text: _csv_rows(text, path, separator or usual))
    return _text_file(path, _text_rows)


def _text_file(path: Path, read: Callable[[TextIO], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What `read` finds in the file, unpacked and decoded. Raises DataError."""
    try:
        # Lines end as they do in the file: those within a cell are the cell's.
        with _opened(path) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
            yield from read(text)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}: not a whole gzip file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: line {_line_in_another_code(path)}: not UTF-8") from None


def _opened(path: Path) -> BinaryIO:
    packed = path.suffix.lower() == ".gz"
    return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]  # GzipFile is one but in name


def _line_in_another_code(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with _opened(path) as content:
        for number, line in enumerate(content, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _text_rows(text: TextIO) -> Iterator[dict[str, Any]]:
    """A row for each line that says something."""
    for line in text:
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _json_rows(text: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines, or one JSON list of objects. Read here rather than by a table library, which would name no line and
    fill in columns that a row does not have."""
    for number, row in enumerate(_json_values(text, path), start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: should be an object of columns, is {type(row).__name__}")
        yield row


def _json_values(text: TextIO, path: Path) -> Iterator[Any]:
    first = True
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _json("\n" * (number - 1) + line + text.read(), f"{path}")
            return
        first = False
        yield _json(line.rstrip("\r\n"), f"{path}: line {number}")


def _json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = _first_repeated(key for key, _ in pairs)
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


def _csv_rows(text: TextIO, path: Path, separator: str) -> Iterator[dict[str, Any]]:
    """Every cell is text, as it stands in the file. A table library would make numbers of `007`, nothing of `NA`, and
    would take the first of three cells under two names for a row's number."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(text, delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        _check_names(names, path)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}: line {reader.line_num}: {len(cells)} cells under {len(names)} names; put text that "
                    f"holds a {SEPARATORS.get(separator, separator)} in double quotes"
                )
            yield dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not CSV: {error}") from None


SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}


def _check_names(names: list[str], path: Path) -> None:
    """Raises DataError for a first line that names no columns."""
    other = next((mark for mark in OTHER_SEPARATORS if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise DataError(f"{path}: the first line names one column, {names[0]!r}; set separator: {other!r}")
    twice = _first_repeated(names)
    if twice is not None:
        raise DataError(f"{path}: column {twice!r} stands twice in the first line")


def _first_repeated(names: Iterable[str]) -> str | None:
    """The first of `names` that stood before."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from map(without_nulls, batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A table has one type for a column, and fills in None, within it, for every key that another row has."""
    return {name: _inner_without_nulls(value) for name, value in row.items()}


def _inner_without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _inner_without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_inner_without_nulls(inner) for inner in value]
    return value


def first_line(error: BaseException) -> str:
    """What another library says of what went wrong, in short."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0] if lines else type(error).__name__)
