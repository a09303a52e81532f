"""Writing so that a crash leaves the old state or the new one, never something between. Standard library only."""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from remix_cli.errors import BusyError, RecipeError, RemixError, StorageError

MIB = 2**20
T = TypeVar("T")


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
    """A hidden sibling of `target` that nobody else uses, so that publishing is a rename within one file system."""
    return target.with_name(f".tmp-{target.name}-{int.from_bytes(os.urandom(6))}")


@contextmanager
def publish_folder(target: Path, needed: int | None = None, *, replace: bool = False) -> Iterator[Path]:
    """Fill the folder that is yielded; it becomes `target` when the block ends well, and vanishes otherwise.

    Files, folder and parent are flushed to disk in that order. With `replace` an existing `target` gives way in one
    step, so that readers find it whole at any time; without it nothing that exists is touched, whenever it came.
    What killed processes left of `target` is removed first. `needed` bytes are named when there is no room. Raises
    RecipeError if `target` exists and is not to be replaced, BusyError if another process is writing it, StorageError.
    """
    with storage_errors(target, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not replace and os.path.lexists(target):
            raise RecipeError(f"{target}: exists already; choose a new folder")
        _remove_abandoned(target)
        scratch, held = _make_scratch(target)
    try:
        with storage_errors(target, needed):
            yield scratch
            for path in sorted(scratch.rglob("*")):
                _sync(path)
            _sync(scratch)
            _put(scratch, target, replace=replace)
            _sync(target.parent)
    finally:
        with suppress(OSError):
            remove(scratch)
        if held is not None:
            os.close(held)


def _make_scratch(target: Path) -> tuple[Path, int | None]:
    """A new scratch folder, and the descriptor that holds it."""
    while True:
        scratch = scratch_name(target)
        scratch.mkdir()
        with suppress(FileNotFoundError, BlockingIOError):  # taken for abandoned in the instant before it was held
            held = _hold(scratch)
            if scratch.exists():
                return scratch, held


def _put(scratch: Path, target: Path, *, replace: bool) -> None:
    """Give `scratch` the name `target`; what was replaced has the name of `scratch` then. Raises RecipeError."""
    if not replace or not os.path.lexists(target):
        try:
            if not _rename(scratch, target, NO_REPLACE):
                target.mkdir()  # whoever makes it owns the name: a rename replaces an empty folder and nothing else
                scratch.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise RecipeError(f"{target}: came into being meanwhile and is left alone; choose another folder") from None
    elif not _rename(scratch, target, EXCHANGE):
        retired = scratch.with_name(scratch.name + ".old")
        target.rename(retired)  # after a crash between these two `recover` puts the old one back
        scratch.rename(target)
        remove(retired)


NO_REPLACE, EXCHANGE = 1, 2  # of Linux's renameat2


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Rename by the rule of `flag`; False where the system or this file system does not know it. Raises OSError."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    sys.audit("os.rename", str(source), str(target), -1, -1)
    here = -100  # AT_FDCWD: paths count from the working directory
    if call(here, os.fsencode(source), here, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _hold(path: Path) -> int | None:
    """Keep others from tidying `path` for as long as the descriptor is open; None where folders cannot be locked."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # some network file systems
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(target: Path) -> None:
    """Remove the scratch that killed processes left of `target`. Raises BusyError if one of them is alive."""
    for path in _scratch_of(target.parent):
        if _owner(path) != target.name or path.name.endswith(".old"):
            continue
        try:
            held = _hold(path)
        except FileNotFoundError:  # published or removed meanwhile
            continue
        except BlockingIOError:
            raise BusyError(f"{target}: another process is writing it; wait for it, or choose another name") from None
        if held is not None:
            shutil.rmtree(path)
            os.close(held)


def _scratch_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob(".tmp-*")) if _owner(path)]


def _owner(scratch: Path) -> str | None:
    """The name for which a scratch file or folder was made; None if it is not one of ours."""
    name, _, number = scratch.name.removeprefix(".tmp-").removesuffix(".old").rpartition("-")
    return name if name and number.isdigit() else None


def recover(folder: Path) -> None:
    """Tidy what a killed process left directly in `folder`: the caller holds its lock, so nobody else writes there.

    A folder that was moved aside and not yet replaced comes back; unfinished scratch goes. Raises StorageError.
    """
    with storage_errors(folder):
        for path in _scratch_of(folder):
            name = _owner(path)
            assert name is not None
            if path.name.endswith(".old") and not (folder / name).exists():
                path.rename(folder / name)
            else:
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link, which may lead to another disk: what it leads to stays. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_whole(folder: Path, read: Callable[[Path], T]) -> T:
    """`read(folder)`, and again if it failed while the folder was being replaced: some of what it read was of another.

    Raises what `read` raises about a folder that stayed as it was.
    """
    while True:
        before = _version(folder)
        try:
            return read(folder)
        except (OSError, RemixError):
            if _version(folder) == before:
                raise


def _version(folder: Path) -> tuple[int, ...] | None:
    """Which folder has this name now; None if none has. An inode's number alone may be given out again."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


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


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, to be written as JSON, and a hash of them: `is_sealed` tells whether they are read as written."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return values | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(values: dict[str, Any]) -> bool:
    return seal({key: value for key, value in values.items() if key != "sha256"}) == values


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def closed_quietly(file: IO[Any]) -> Iterator[None]:
    """Close `file`, whose every write was flushed: on a full disk closing tries once more what has been told."""
    try:
        yield
    finally:
        with suppress(OSError):
            file.close()


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
    with closed_quietly(file):
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
