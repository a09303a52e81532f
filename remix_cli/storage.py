"""Writing so that a crash leaves the old state or the new one, never something between. Standard library only."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from remix_cli.errors import BusyError, StorageError


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        free = ""
        if path.parent.is_dir():
            free = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free there)"
        raise StorageError(f"cannot write {path}: {error.strerror or error}{free}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scratch_name(target: Path) -> Path:
    """A hidden sibling of `target`, so that publishing is a rename within one file system."""
    return target.with_name(f".tmp-{target.name}-{os.getpid()}")


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Fill the folder that is yielded; it becomes `target` when the block ends well, and vanishes otherwise.

    Files, folder and parent are flushed to disk in that order. An existing `target` is replaced.
    Raises StorageError when the file system refuses.
    """
    scratch = scratch_name(target)
    with _storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    try:
        with _storage_errors(target):
            yield scratch
            for path in sorted(scratch.rglob("*")):
                _sync(path)
            _sync(scratch)
            if target.exists():  # two renames: a crash between them leaves the old one under its hidden name
                retired = scratch.with_name(scratch.name + ".old")
                target.rename(retired)
                scratch.rename(target)
                shutil.rmtree(retired)
            else:
                scratch.rename(target)
            _sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in one step. Raises StorageError."""
    scratch = scratch_name(path)
    try:
        with _storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            scratch.unlink()


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the kernel frees it however the process ends. Raises BusyError."""
    with _storage_errors(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BusyError(f"{folder}: in use by process {file.read().strip() or 'unknown'}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
