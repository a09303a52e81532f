"""The per-example file of one task, written as answers come, so that an interrupted evaluation continues."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from remix_cli.errors import BusyError
from remix_cli.storage import storage_errors, write_text

Line = dict[str, Any]


class Lines:
    """`<name>.partial.jsonl` until the report is written: a line with the stamp, then one per item.

    Lines of an earlier evaluation with the same stamp count; a torn last line does not.
    """

    def __init__(self, path: Path, file: Any, done: dict[int, Line]):
        self.path, self._file, self.done = path, file, done

    def add(self, item: int, line: Line) -> None:
        with storage_errors(self.path):
            self._file.write((json.dumps({"item": item} | line) + "\n").encode())
            self._file.flush()
        self.done[item] = {"item": item} | line

    def publish(self) -> None:
        """Write the final file, items in order, and drop the partial one."""
        lines = (self.done[item] for item in sorted(self.done))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(self.path.with_name(self.path.name.replace(".partial", "")), text)
        self.path.unlink()


@contextmanager
def open_lines(folder: Path, name: str, stamp: dict[str, Any]) -> Iterator[Lines]:
    """Raises BusyError if another evaluation is writing there, StorageError if the disk refuses."""
    path = folder / f"{name}.partial.jsonl"
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{path}: another evaluation is writing there; wait for it") from None
        with storage_errors(path):
            done = _keep_valid(file, stamp)
        yield Lines(path, file, done)


def _keep_valid(file: Any, stamp: dict[str, Any]) -> dict[int, Line]:
    """The earlier lines if they were made under this stamp; the file is cut after the last whole one."""
    file.seek(0)
    header = json.dumps({"stamp": stamp}, sort_keys=True).encode() + b"\n"
    done: dict[int, Line] = {}
    end = 0
    if file.readline() == header:
        end = len(header)
        for raw in file:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if line is None:
                break
            done[line["item"]] = line
            end += len(raw)
    file.truncate(end)
    if not end:
        file.write(header)
        file.flush()
    return done
