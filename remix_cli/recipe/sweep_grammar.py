"""Sweeps: one file that stands for many recipes.

A list where a recipe takes one value is an axis; the grid is the product of all axes. `sweep.arms` names what is
compared: each arm changes some dotted keys and is searched apart. Nothing here runs anything.
"""

import copy
import itertools
import json
import math
import random
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import regex
from pydantic import Field, ValidationError

from remix_cli.errors import RecipeError
from remix_cli.recipe.loader import RawRecipe, build, drop_unread, drop_value, models_in, read_raw, set_value
from remix_cli.recipe.schema import Recipe
from remix_cli.recipe.sources import Positive, Seed, Strict

RANGE = "log_uniform"
Setting = dict[str, Any]  # dotted keys and their values


class SweepGroup(Strict):
    """The `sweep` group of a sweep file."""

    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = Field(
        {"run": {}}, description="Name -> dotted keys and their values; the first arm is what others are compared with."
    )
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(
        [0],
        description="The search runs under the first, the best setting of each arm under all; by default the "
        "recipe's seed. Rows cut from train are those of the first for all.",
    )
    draws: Positive | None = Field(None, description="So many random points of each arm's grid instead of all.")
    metric: str | None = Field(
        None, description="Of the held-out rows at the end of a run; by default train.metric_for_best_model."
    )


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    arm: str
    setting: Setting  # the values of this arm's axes
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)


@dataclass(frozen=True)
class Sweep:
    """What to search and how; `points` of each arm under the first seed."""

    folder: Path
    seeds: list[int]
    metric: str
    arms: list[str]  # all of the file, in its order; the first is the reference
    points: dict[str, list[Point]]
    others: dict[str, list[Point]] = field(default_factory=dict)  # of the arms that `--only` leaves out

    def under(self, point: Point, seed: int) -> Point:
        """The same setting under another seed."""
        folder = point.folder.with_name(f"{_name(point.setting)}seed{seed}")
        recipe = point.recipe.model_copy(update={"seed": seed, "output_dir": str(folder)})
        return Point(point.arm, point.setting, seed, recipe)


def load_sweep(path: Path, overrides: list[str] | tuple[str, ...] = (), only: str | None = None) -> Sweep:
    """Every recipe of the sweep, checked; to be run are the arms whose whole name matches the expression `only`.

    Raises RecipeError with all problems, each once.
    """
    raw = read_raw(path, overrides)
    values = raw.values.pop("sweep", {})
    problems: dict[str, None] = {}
    if isinstance(values, dict) and isinstance(raw.values.get("seed"), int):
        if "seeds" in values:
            problems[f"{raw.where('seed')}: seed: is not read: sweep.seeds says under which seeds; leave it out"] = None
        values = {"seeds": [raw.values["seed"]]} | values
    group = _group(raw, values)
    if len(set(group.seeds)) < len(group.seeds):
        raise RecipeError(f"{raw.where('sweep.seeds')}: sweep.seeds: one seed twice would be one run counted twice")
    root = raw.values.get("output_dir")
    if not isinstance(root, str):
        build(raw)  # says what is wrong with it
    if isinstance(raw.values.get("seed"), list):
        problems["seed: a sweep's seeds are sweep.seeds; a list of seeds is no axis"] = None
    every: dict[str, list[Point]] = {}
    idle: list[dict[str, str]] = []
    matching = _matching(list(group.arms), only)
    for arm in group.arms:
        changes = group.arms[arm]
        one = copy.deepcopy(raw)
        for dotted, value in changes.items():
            if dotted in ("seed", "output_dir"):
                problems[f"sweep.arms.{arm}: {dotted} is the sweep's to set; leave it out"] = None
            try:
                set_value(one.values, dotted, copy.deepcopy(value))
            except ValueError as error:
                problems[f"sweep.arms.{arm}: {error}"] = None
        try:
            every[arm], unread = _points(one, arm, set(changes), group, Path(str(root)))
            idle.append(unread)
        except RecipeError as error:
            problems |= dict.fromkeys(error.problems)
    if len(idle) == len(group.arms):  # what one arm does not read must count for another
        problems |= {line: None for key, line in idle[0].items() if all(key in other for other in idle)}
    slugs = [slug(arm) for arm in group.arms]
    for arm in group.arms:
        if slugs.count(slug(arm)) > 1:
            problems[f"sweep.arms.{arm}: another arm's folder would have the same name, {slug(arm)}"] = None
    if problems:
        raise RecipeError(*problems)
    points = {arm: every.pop(arm) for arm in matching}
    first = next(iter(points.values()))[0].recipe
    metric = group.metric or first.train.metric_for_best_model
    return Sweep(Path(str(root)), group.seeds, metric, list(group.arms), points, every)


def _matching(arms: list[str], only: str | None) -> list[str]:
    try:
        found = [arm for arm in arms if only is None or regex.fullmatch(only, arm, timeout=1)]
    except (RecursionError, MemoryError, TimeoutError):
        raise RecipeError(f"--only: {only!r} takes too long to match; repeat nothing that repeats itself") from None
    except regex.error as error:
        raise RecipeError(f"--only: {only!r} is not a regular expression: {error}") from None
    if not found:
        raise RecipeError(f"--only: {only!r} matches no arm; there are {', '.join(arms)}")
    return found


def _group(raw: RawRecipe, values: Any) -> SweepGroup:
    try:
        return SweepGroup.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            dotted = ".".join(map(str, ("sweep", *problem["loc"])))
            valid = f"; valid here: {', '.join(SweepGroup.model_fields)}" if "extra" in problem["type"] else ""
            problems.append(f"{raw.where(dotted)}: {dotted}: {problem['msg']}{valid}")
        raise RecipeError(*problems) from None


def _points(
    raw: RawRecipe, arm: str, own: set[str], group: SweepGroup, root: Path
) -> tuple[list[Point], dict[str, str]]:
    """The arm's recipes under the first seed, and the shared keys that none of them reads, with their refusals.

    Raises RecipeError; what the arm itself sets is named as its own.
    """
    axes = dict(_axes(raw.values, Recipe, ""))
    data = raw.values.get("data")
    apart = isinstance(data, dict) and data.get("validation")  # the held-out rows are a file's, not the axis'
    other_rows = next((a for a in axes if a.startswith("data.") and not (apart and a == "data.train")), None)
    if other_rows:
        raise RecipeError(
            f"sweep.arms.{arm}: {other_rows}: each value has other held-out rows, so the best cannot be chosen by "
            "them; make them arms"
        )
    made: list[Point] = []
    problems: dict[str, None] = {}
    tried: list[RawRecipe] = []
    idle: list[dict[str, str]] = []
    for setting in _settings(axes, group.draws, arm, problems):
        one = copy.deepcopy(raw)
        for dotted, value in setting.items():
            set_value(one.values, dotted, copy.deepcopy(value))
        tried.append(one)
        idle.append(drop_unread(one, own))  # what others share with this arm
        seed = group.seeds[0]
        folder = root / slug(arm) / f"{_name(setting)}seed{seed}"
        if any(point.folder == folder for point in made):
            raise RecipeError(f"sweep.arms.{arm}: two of its settings would share the folder {folder}")
        one.values |= {"seed": seed, "output_dir": str(folder)}
        if isinstance(data, dict) and not apart and data.get("validation_fraction") != 0:
            # the same held-out rows for all runs
            one.values["data"] = {"split_seed": seed} | one.values["data"]
        one.overridden |= own | set(setting)
        try:
            made.append(Point(arm, setting, seed, build(one)))
        except RecipeError as error:
            told = (line.replace("override: ", "", 1) for line in error.problems)
            problems |= {f"sweep.arms.{arm}: {line}" if len(group.arms) > 1 else line: None for line in told}
    if problems:
        raise RecipeError(*problems)
    never = {key: line for key, line in idle[0].items() if all(key in other for other in idle)}
    for axis in axes:
        line = next((unread[axis] for unread in idle if axis in unread), None)
        if line is None:
            continue
        if any(axis not in unread and _counts(one, axis) for one, unread in zip(tried, idle, strict=True)):
            raise RecipeError(
                f"sweep.arms.{arm}: {axis}: not all of the arm's settings read it, so some would be run twice; make "
                "them arms"
            )
        drop_value(raw.values, axis)  # another arm's axis: here one setting many times over
        fewer, rest = _points(raw, arm, own, group, root)
        return fewer, rest | {axis: line}
    return made, never


def _counts(raw: RawRecipe, key: str) -> bool:
    """Would the recipe be another without the key?"""
    without = copy.deepcopy(raw)
    drop_value(without.values, key)
    return build(without) != build(raw)


def _axes(values: dict[str, Any], model: Any, at: str) -> typing.Iterator[tuple[str, Any]]:
    """(dotted key, its values) wherever a list, or a range, stands in place of one value."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            continue
        takes_list = _takes_list(field.annotation)
        of_lists = isinstance(value, list) and value and all(isinstance(v, list) for v in value)
        is_axis = of_lists if takes_list else isinstance(value, list)
        if is_axis or (isinstance(value, dict) and set(value) == {RANGE}):
            yield at + key, value
        elif isinstance(value, dict) and not takes_list:
            for inner in models_in(field.annotation)[:1]:
                yield from _axes(value, inner, f"{at}{key}.")


def _takes_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list or any(map(_takes_list, typing.get_args(annotation)))


def _settings(axes: dict[str, Any], draws: int | None, arm: str, problems: dict[str, None]) -> list[dict[str, Any]]:
    """All points of the grid, or `draws` of them at random: the same ones whenever the sweep is read again."""
    ranges = {dotted: axis[RANGE] for dotted, axis in axes.items() if isinstance(axis, dict)}
    lists = {dotted: axis for dotted, axis in axes.items() if dotted not in ranges}
    for dotted, axis in lists.items():
        if not axis:
            problems[f"{dotted}: an empty list has no value to try"] = None
    for dotted, bounds in ranges.items():
        numbers = isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
        if not numbers or not 0 < bounds[0] < bounds[1]:
            problems[f"{dotted}: {RANGE} takes two numbers, 0 < low < high"] = None
        elif draws is None:
            problems[f"{dotted}: {RANGE} has no grid; say in sweep.draws how many points to try"] = None
    if problems:
        return []
    if draws is None:
        return [dict(zip(lists, point, strict=True)) for point in itertools.product(*lists.values())]
    source = random.Random(f"{arm} {sorted(axes)}")
    count = math.prod(map(len, lists.values()))
    if not ranges:  # distinct points of the grid
        places = source.sample(range(count), min(draws, count))
        grid = list(itertools.product(*lists.values()))
        return [dict(zip(lists, grid[place], strict=True)) for place in sorted(places)]
    drawn = []
    for _ in range(draws):
        point = {dotted: source.choice(axis) for dotted, axis in lists.items()}
        for dotted, (low, high) in ranges.items():
            point[dotted] = float(f"{math.exp(source.uniform(math.log(low), math.log(high))):.3g}")
        drawn.append({dotted: point[dotted] for dotted in axes})
    return drawn


def slug(text: str) -> str:
    """As a folder's name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.") or "run"


def describe(setting: Setting) -> str:
    """`learning_rate=0.003, rank=8`; empty for an arm without axes. Whole keys where two end alike."""
    ends = [dotted.rpartition(".")[2] for dotted in setting]
    names = [end if ends.count(end) == 1 else dotted for end, dotted in zip(ends, setting, strict=True)]
    return ", ".join(f"{name}={_shown(value)}" for name, value in zip(names, setting.values(), strict=True))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _name(setting: Setting) -> str:
    text = slug(describe(setting)) if setting else ""
    return f"{text[:100]}-" if text else ""
