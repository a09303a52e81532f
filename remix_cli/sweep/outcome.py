"""What a sweep leaves to go on with: the recipe of the arm to take, and what to do with it."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from remix_cli.recipe import Recipe
from remix_cli.recipe.sweep_grammar import Point, Sweep, describe
from remix_cli.storage import write_text
from remix_cli.sweep.report import SweepReport

BEST = "best.yaml"
SPELT_OUT = "sweep.yaml"


@dataclass(frozen=True)
class Outcome:
    """Files and run folders to name to the user."""

    recipe: Path  # of the arm to take
    run: Path  # of that arm, under the first seed
    spelt_out: Path | None  # the sweep file that a plain recipe stands for


def write_spelt_out(sweep: Sweep) -> Path | None:
    """The sweep file that a plain recipe stands for. One that somebody has changed since stays. Raises StorageError."""
    if sweep.spelt_out is None:
        return None
    path = sweep.folder / SPELT_OUT
    text = f"# remix sweep {path}\n#\n# Yours to change: more arms, seeds or values. Runs that are there count.\n"
    if not path.exists():
        write_text(path, text + sweep.spelt_out)
    return path


def write_outcome(sweep: Sweep, report: SweepReport) -> Outcome | None:
    """None if the report has no arm to take. Raises StorageError."""
    if report.decision is None:
        return None
    taken = next(arm for arm in report.arms if arm.arm == report.decision.take)
    point = _point(sweep, taken.arm, taken.setting)
    path = sweep.folder / BEST
    recipe = point.recipe.model_copy(update={"output_dir": f"{sweep.folder}-best"})
    what = f"{taken.arm} {taken.setting}".strip()
    write_text(path, f"# remix train {path}\n#\n# What {sweep.folder} says to take: {what}.\n{_as_said(recipe)}")
    spelt_out = sweep.folder / SPELT_OUT
    return Outcome(path, point.folder, spelt_out if spelt_out.is_file() else None)


def _as_said(recipe: Recipe) -> str:
    """Without the defaults, so that one sees what was chosen; loading it gives the same recipe."""
    said = {key: value for key, value in recipe.model_dump(exclude_unset=True).items() if value != {}}
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def _point(sweep: Sweep, arm: str, setting: str) -> Point:
    points = (sweep.points | sweep.others)[arm]
    return next(point for point in points if describe(point.setting) == setting)
