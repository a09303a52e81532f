"""The per-example file of one task, written as answers come, so that an interrupted evaluation continues."""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from remix_cli.errors import BusyError
from remix_cli.storage import closed_quietly, storage_errors, write_text
from remix_cli.tasks.base import Line


class Lines:
    """`<name>.partial.jsonl` until the report is written: a line with the stamp, then one per item and its digest.

    Lines of an earlier evaluation with the same stamp count; a torn one, or one that was changed, does not.
    """

    def __init__(self, path: Path, file: Any, header: bytes, done: dict[int, Line]):
        self.path, self._file, self._header, self.done = path, file, header, done

    def add(self, item: int, line: Line) -> None:
        line = {"item": item} | line
        with storage_errors(self.path):
            self._file.write((json.dumps(line | {"digest": _digest(self._header, line)}) + "\n").encode())
            self._file.flush()
        self.done[item] = line

    def publish(self) -> None:
        """Write the final file, items in order, and drop the partial one."""
        lines = (self.done[item] for item in sorted(self.done))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(self.path.with_name(self.path.name.replace(".partial", "")), text)
        self.path.unlink()


@contextmanager
def open_lines(folder: Path, name: str, stamp: Mapping[str, object]) -> Iterator[Lines]:
    """The file of one task; `stamp`, a JSON object, is what earlier lines must have been made under to count.

    Raises BusyError if another evaluation is writing there, StorageError if the disk refuses.
    """
    path = folder / f"{name}.partial.jsonl"
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with closed_quietly(file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{path}: another evaluation is writing there; wait for it") from None
        header = json.dumps({"stamp": stamp}, sort_keys=True).encode() + b"\n"
        with storage_errors(path):
            done = _keep_valid(file, header)
        yield Lines(path, file, header, done)


def _digest(header: bytes, line: Line) -> str:
    """Of an answer under its stamp."""
    return hashlib.sha256(header + json.dumps(line).encode()).hexdigest()[:16]


def _keep_valid(file: Any, header: bytes) -> dict[int, Line]:
    """The earlier lines if they were made under this stamp; the file is cut where one is not as it was written."""
    file.seek(0)
    done: dict[int, Line] = {}
    end = 0
    if file.readline() == header:
        end = len(header)
        for raw in file:
            try:
                line = json.loads(raw)
                whole = raw.endswith(b"\n") and line.pop("digest") == _digest(header, line)
            except (ValueError, KeyError, TypeError, AttributeError):
                whole = False
            if not whole:
                break
            done[line["item"]] = line
            end += len(raw)
    file.truncate(end)
    if not end:
        file.write(header)
        file.flush()
    return done
