"""How large the runs of a sweep are, by their folders."""

from collections.abc import Iterable
from pathlib import Path

from remix_cli.errors import DataError
from remix_cli.recipe.sweep_grammar import Point
from remix_cli.train.run_size import RunSize, sizes_of


def run_sizes(points: Iterable[Point]) -> dict[Path, RunSize]:
    """Raises DataError, StorageError: what is wrong with the rows shows before anything is trained."""
    alike: dict[str, list[Point]] = {}
    for point in points:
        alike.setdefault(f"{point.recipe.model} {point.recipe.data}", []).append(point)
    sizes: dict[Path, RunSize] = {}
    for some in alike.values():
        try:
            found = sizes_of([point.recipe for point in some])
        except DataError as error:
            raise DataError(*(_of_arm(line, some) for line in error.problems)) from None
        sizes |= {point.folder: size for point, size in zip(some, found, strict=True)}
    return sizes


def _of_arm(line: str, points: list[Point]) -> str:
    """What is wrong with the rows concerns all; that they are too few for a router's clusters, one arm."""
    if not line.startswith("router.clusters"):
        return line
    arm = max(points, key=lambda point: point.recipe.router.clusters).arm
    return f"sweep.arms.{arm}: {line}; or leave the arm out: --only '(?!{arm}$).*'"
