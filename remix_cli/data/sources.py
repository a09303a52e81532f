"""Rows from one source of the recipe, as plain dictionaries."""

from pathlib import Path
from typing import Any

from remix_cli.errors import DataError
from remix_cli.recipe.schema import Source

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def check_source(source: Source, key: str) -> list[str]:
    """Problems that can be seen without reading rows: one line each, `key` being the source's place."""
    if source.path is None or not _looks_local(source.path):
        return []
    path = Path(source.path)
    if path.is_dir():
        if any(file.suffix in LOADERS for file in path.iterdir()):
            return []
        return [f"{key}.path: {path}: no {', '.join(LOADERS)} file in this folder"]
    if not path.exists():
        return [f"{key}.path: {path}: no such file"]
    if not path.is_file():
        return [f"{key}.path: {path}: not a regular file"]
    if path.suffix not in LOADERS:
        return [f"{key}.path: {path}: unknown ending; use one of {', '.join(LOADERS)}"]
    return []


def _looks_local(path: str) -> bool:
    """A hub id is `owner/name` or `name`; anything that exists, is rooted or ends like a file is local."""
    return (
        Path(path).exists() or path.startswith((".", "/", "~")) or Path(path).suffix in LOADERS or path.count("/") > 1
    )


def load_rows(source: Source) -> list[dict[str, Any]]:
    """All rows of `source`, in order. Raises DataError."""
    rows = _reasoning_gym_rows(source) if source.reasoning_gym else _dataset_rows(source)
    if source.limit is not None:
        rows = rows[: source.limit]
    if not rows:
        raise DataError(f"{source.path or source.reasoning_gym}: no rows")
    return rows


def _dataset_rows(source: Source) -> list[dict[str, Any]]:
    import datasets

    assert source.path is not None
    problems = check_source(source, "data")
    if problems:
        raise DataError(*problems)
    datasets.disable_progress_bars()
    try:
        if _looks_local(source.path):
            files = _files(Path(source.path), source.split)
            kind = LOADERS[files[0].suffix]
            loaded = datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train")
        else:
            loaded = datasets.load_dataset(source.path, source.subset, split=source.split)
    except DataError:
        raise
    except Exception as error:  # datasets raises its own, pyarrow's and the hub's errors
        reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise DataError(f"{source.path}: cannot be read: {reason}") from None
    return loaded.to_list()


SPLITS = ("train", "validation", "valid", "dev", "test")


def _files(path: Path, split: str) -> list[Path]:
    """The files of a local source. In a folder: those named after the split, or all if none is named after any.

    Raises DataError rather than read another split's rows, or files of several kinds.
    """
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.iterdir() if f.suffix in LOADERS)
    named = [f for f in files if f.stem.split("-")[0] == split]
    others = [f.name for f in files if any(name in f.stem.lower() for name in SPLITS)]
    if not named and others:
        raise DataError(f"{path}: no file named {split}; it holds {', '.join(others)}: name one file, or set split")
    files = named or files
    if len({f.suffix for f in files}) > 1:
        raise DataError(f"{path}: files of several kinds ({', '.join(f.name for f in files)}); name one file")
    return files


def _reasoning_gym_rows(source: Source) -> list[dict[str, Any]]:
    try:
        import reasoning_gym
    except ImportError:
        raise DataError("reasoning_gym: not installed; pip install 'remix-cli[demo]'") from None
    try:
        made = reasoning_gym.create_dataset(source.reasoning_gym, size=source.size, seed=source.seed, **source.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"reasoning_gym {source.reasoning_gym!r}: {error}") from None
    return [{"prompt": entry["question"], "completion": str(entry["answer"])} for entry in made]
