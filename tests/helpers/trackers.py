"""What trackers hold, read back from what they wrote on this machine."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

Point = tuple[str, int, float]  # of a measure, at a step, its value


def points_of(tool: str, folder: Path) -> list[Point]:
    """Every point of the one tracked run of the run in `folder`, in any order."""
    return sorted(READERS[tool](folder))


def logged(folder: Path) -> list[Point]:
    """What metrics.jsonl says."""
    points = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        points += [(key, step, float(value)) for key, value in record.items()]
    return sorted(points)


def _tensorboard(folder: Path) -> Iterator[Point]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    for key in read.Tags()["scalars"]:
        yield from ((key, event.step, event.value) for event in read.Scalars(key))


def _wandb(folder: Path) -> Iterator[Point]:
    """A .wandb file is a log of records in blocks, as LevelDB writes it, behind seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = data[at + 7 : at + 7 + length]
        at += 7 + length
        whole = whole + body if kind in (3, 4) else body
        if kind in (1, 4):
            record = Record.FromString(whole)
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            row = {key: json.loads(value) for key, value in items.items() if not key.startswith("_")}
            if row:
                step = json.loads(items["_step"])
                yield from ((key, step, value) for key, value in row.items() if not key.startswith("routing"))


def _mlflow(folder: Path) -> Iterator[Point]:
    import mlflow

    run = json.loads((folder / "trackers.json").read_text())["runs"]["mlflow"]
    client = mlflow.MlflowClient()
    for key in client.get_run(run).data.metrics:
        for point in client.get_metric_history(run, key):
            yield key, point.step, point.value


def _trackio(folder: Path) -> Iterator[Point]:
    from trackio.sqlite_storage import SQLiteStorage

    key = json.loads((folder / "trackers.json").read_text())["key"]
    for row in SQLiteStorage.get_logs("remix", f"{folder.parent.name}/{folder.name}-{key[:8]}"):
        step, _ = row.pop("step"), row.pop("timestamp")
        yield from ((name, step, value) for name, value in row.items() if isinstance(value, int | float))


def _dvclive(folder: Path) -> Iterator[Point]:
    root = folder / "dvclive" / "plots" / "metrics"
    for path in root.rglob("*.tsv"):
        key = str(path.relative_to(root).with_suffix(""))
        for line in path.read_text().splitlines()[1:]:
            step, value = line.split("\t")
            yield key, int(step), float(value)


READERS = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "dvclive": _dvclive,
}
