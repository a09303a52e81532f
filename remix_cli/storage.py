"""Writing so that a crash leaves the old state or the new one, never something between. Standard library only."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from remix_cli.errors import BusyError, StorageError

MIB = 2**20


@contextmanager
def storage_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the file system's refusals into a StorageError that names `path`, the bytes needed and those free."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "(os error" not in str(error):  # libraries in Rust have their own
            raise
        room = [] if needed is None else [f"{needed / MIB:.1f} MiB needed"]
        if path.parent.is_dir():
            room.append(f"{shutil.disk_usage(path.parent).free / MIB:.1f} MiB free")
        space = f" ({', '.join(room)})" if room else ""
        raise StorageError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}{space}; make room there"
        ) from error


def free_bytes(path: Path) -> int:
    """Free space where `path` is or would be. Raises StorageError."""
    with storage_errors(path):
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free


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
def publish_folder(target: Path, needed: int | None = None) -> Iterator[Path]:
    """Fill the folder that is yielded; it becomes `target` when the block ends well, and vanishes otherwise.

    Files, folder and parent are flushed to disk in that order. An existing `target` is replaced. `needed`
    bytes are named when there is no room. Raises StorageError when the file system refuses.
    """
    scratch = scratch_name(target)
    with storage_errors(target, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    try:
        with storage_errors(target, needed):
            yield scratch
            for path in sorted(scratch.rglob("*")):
                _sync(path)
            _sync(scratch)
            if target.exists():  # two renames: after a crash between them `recover` puts the old one back
                retired = scratch.with_name(scratch.name + ".old")
                target.rename(retired)
                scratch.rename(target)
                shutil.rmtree(retired)
            else:
                scratch.rename(target)
            _sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def recover(folder: Path) -> None:
    """Tidy what a killed process left directly in `folder`: the caller holds its lock, so nobody else writes there.

    A folder that was moved aside and not yet replaced comes back; unfinished scratch goes. Raises StorageError.
    """
    with storage_errors(folder):
        for path in sorted(folder.glob(".tmp-*")):
            name, _, process = path.name.removeprefix(".tmp-").removesuffix(".old").rpartition("-")
            if not name or not process.isdigit():
                continue
            if path.name.endswith(".old") and not (folder / name).exists():
                path.rename(folder / name)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in one step. Raises StorageError."""
    scratch = scratch_name(path)
    try:
        with storage_errors(path):
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
    """Hold `folder` for this process; the kernel frees it however the process ends. Raises BusyError.

    A folder that was made for the lock and holds nothing else when the block fails is removed again.
    """
    path = folder / ".lock"
    with storage_errors(path):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        with storage_errors(path):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise BusyError(f"{folder}: in use by process {file.read().strip() or 'unknown'}") from None
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise BusyError(f"{folder}: another process has just given it up; start again")
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        with _removed_if_empty(folder) if made else nullcontext():
            yield


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if [p.name for p in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()
        raise
