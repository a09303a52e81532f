"""Sweeps: one file that stands for many recipes.

A list where a recipe takes one value is an axis; the grid is the product of all axes. `sweep.arms` names what is
compared: each arm changes some dotted keys and is searched apart. A recipe with neither stands for the obvious
comparison (obvious.py). Nothing here runs anything.
"""

import copy
import itertools
import json
import math
import random
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import regex
import yaml
from pydantic import Field, ValidationError

from remix_cli.errors import RecipeError
from remix_cli.recipe.loader import RawRecipe, build, drop_unread, drop_value, models_in, read_raw, set_value
from remix_cli.recipe.obvious import consecutive, make_obvious
from remix_cli.recipe.schema import Recipe, measures_while_training
from remix_cli.recipe.sources import Positive, Seed, Strict

RANGE = "log_uniform"
Setting = dict[str, Any]  # dotted keys and their values
Problems = dict[str, None]  # lines, in the order in which they were found, each once
Unread = dict[str, str]  # dotted keys that a method does not read, each with its refusal


class SweepGroup(Strict):
    """The `sweep` group of a sweep file."""

    arms: Annotated[dict[str, Setting], Field(min_length=1)] = Field(
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
    spelt_out: str | None = None  # of a plain recipe: the sweep file that it stands for

    def under(self, point: Point, seed: int) -> Point:
        """The same setting under another seed."""
        folder = point.folder.with_name(f"{_name(point.setting)}seed{seed}")
        recipe = point.recipe.model_copy(update={"seed": seed, "output_dir": str(folder)})
        return Point(point.arm, point.setting, seed, recipe)


def load_sweep(
    path: Path,
    overrides: list[str] | tuple[str, ...] = (),
    only: str | None = None,
    seeds: int | None = None,
    flag: str = "--seeds",
) -> Sweep:
    """Every recipe of the sweep, checked; to be run are the arms whose whole name matches the expression `only`.

    `seeds`: how many, from the recipe's seed on, where its file does not say which; `flag` asks for it.
    Raises RecipeError with all problems, each once.
    """
    raw = read_raw(path, overrides)
    is_plain = "sweep" not in raw.values and not any(_axes(raw.values, Recipe, ""))
    if is_plain:
        make_obvious(raw, build(raw))
    problems: Problems = {}
    if seeds is not None:
        _set_seeds(raw, seeds, flag, is_plain)
    spelt_out = yaml.safe_dump(raw.values, sort_keys=False, allow_unicode=True) if is_plain else None
    group = _read_group(raw, problems)
    root = raw.values.get("output_dir")
    if not isinstance(root, str):
        build(raw)  # says what is wrong with it
    if isinstance(raw.values.get("seed"), list):
        problems["seed: a sweep's seeds are sweep.seeds; a list of seeds is no axis"] = None
    matching = _matching(list(group.arms), only)
    points: dict[str, list[Point]] = {}
    unread: list[Unread] = []
    for arm in group.arms:
        one = _recipe_of_arm(raw, arm, group, problems)
        try:
            found = _points(one, arm, set(group.arms[arm]), group, Path(str(root)))
        except RecipeError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        points[arm] = found.points
        unread.append(found.unread)
    if len(unread) == len(group.arms):  # what one arm does not read must count for another
        problems |= dict.fromkeys(_unread_by_all(unread).values())
    slugs = [slug(arm) for arm in group.arms]
    for arm in group.arms:
        if slugs.count(slug(arm)) > 1:
            problems[f"sweep.arms.{arm}: another arm's folder would have the same name, {slug(arm)}"] = None
    if problems:
        raise RecipeError(*problems)
    to_run = {arm: points[arm] for arm in matching}
    others = {arm: points[arm] for arm in points if arm not in to_run}
    metric = group.metric or to_run[matching[0]][0].recipe.train.metric_for_best_model
    sweep = Sweep(Path(str(root)), group.seeds, metric, list(group.arms), to_run, others, spelt_out)
    _check_metric(sweep)
    return sweep


def _set_seeds(raw: RawRecipe, count: int, flag: str, is_plain: bool) -> None:
    """As many from the first on. Raises RecipeError if the file says which."""
    group = raw.values.setdefault("sweep", {})
    if not isinstance(group, dict):  # which is refused later
        return
    if "seeds" in group and not is_plain:
        raise RecipeError(f"{flag}: {raw.where('sweep.seeds')} says in sweep.seeds under which; leave one of them out")
    first = group["seeds"][0] if is_plain else raw.values.get("seed", 0)
    if isinstance(first, int):  # anything else is refused later
        raw.values.pop("seed", None)
        group["seeds"] = consecutive(first, count)


def _check_metric(sweep: Sweep) -> None:
    """Raises RecipeError if an arm's training does not measure the metric."""
    for points in sweep.points.values():
        recipe = points[0].recipe
        tasks = recipe.eval.tasks if recipe.train.eval_tasks_limit else []
        known = ["eval_loss", *measures_while_training(tasks)]
        if sweep.metric not in known:
            raise RecipeError(
                f"sweep.metric: {sweep.metric} is not measured on held-out rows while training; use "
                f"{', '.join(known)}, or set train.eval_tasks_limit for scores of eval.tasks"
            )
        if not recipe.data.validation and not recipe.data.validation_fraction:
            raise RecipeError("data.validation_fraction: 0 leaves no held-out rows to choose by; raise it")


def _read_group(raw: RawRecipe, problems: Problems) -> SweepGroup:
    """Take the `sweep` group out of the file; without seeds of its own it has the recipe's. Raises RecipeError."""
    values = raw.values.pop("sweep", {})
    seed = raw.values.get("seed")
    if isinstance(values, dict) and isinstance(seed, int):
        if "seeds" in values:
            problems[f"{raw.where('seed')}: seed: is not read: sweep.seeds says under which seeds; leave it out"] = None
        values = {"seeds": [seed]} | values
    group = _checked_group(raw, values)
    if len(set(group.seeds)) < len(group.seeds):
        raise RecipeError(f"{raw.where('sweep.seeds')}: sweep.seeds: one seed twice would be one run counted twice")
    return group


def _checked_group(raw: RawRecipe, values: Any) -> SweepGroup:
    try:
        return SweepGroup.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            dotted = ".".join(["sweep", *(str(part) for part in problem["loc"])])
            valid = f"; valid here: {', '.join(SweepGroup.model_fields)}" if "extra" in problem["type"] else ""
            lines.append(f"{raw.where(dotted)}: {dotted}: {problem['msg']}{valid}")
        raise RecipeError(*lines) from None


def _matching(arms: list[str], only: str | None) -> list[str]:
    if only is None:
        return arms
    try:
        found = [arm for arm in arms if regex.fullmatch(only, arm, timeout=1)]
    except (RecursionError, MemoryError, TimeoutError):
        raise RecipeError(f"--only: {only!r} takes too long to match; repeat nothing that repeats itself") from None
    except regex.error as error:
        raise RecipeError(f"--only: {only!r} is not a regular expression: {error}") from None
    if not found:
        raise RecipeError(f"--only: {only!r} matches no arm; there are {', '.join(arms)}")
    return found


def _recipe_of_arm(raw: RawRecipe, arm: str, group: SweepGroup, problems: Problems) -> RawRecipe:
    """The file with the arm's own keys in place."""
    one = copy.deepcopy(raw)
    for dotted, value in group.arms[arm].items():
        if dotted in ("seed", "output_dir"):
            problems[f"sweep.arms.{arm}: {dotted} is the sweep's to set; leave it out"] = None
        try:
            set_value(one.values, dotted, copy.deepcopy(value))
        except ValueError as error:
            problems[f"sweep.arms.{arm}: {error}"] = None
    return one


@dataclass
class _Made:
    """What an arm stands for."""

    points: list[Point]
    unread: Unread  # shared keys that no setting of it reads


def _points(raw: RawRecipe, arm: str, own: set[str], group: SweepGroup, root: Path) -> _Made:
    """The arm's recipes under the first seed. Raises RecipeError; what the arm itself sets is named as its own."""
    axes = dict(_axes(raw.values, Recipe, ""))
    _check_rows(raw, arm, axes)
    cut_from_train = _cuts_held_out_rows(raw)
    made: list[Point] = []
    problems: Problems = {}
    tried: list[RawRecipe] = []
    unread: list[Unread] = []  # of each setting
    seed = group.seeds[0]
    for setting in _settings(axes, group.draws, arm, problems):
        one = copy.deepcopy(raw)
        for dotted, value in setting.items():
            set_value(one.values, dotted, copy.deepcopy(value))
        tried.append(one)
        unread.append(drop_unread(one, own))  # what others share with this arm
        folder = root / slug(arm) / f"{_name(setting)}seed{seed}"
        if any(point.folder == folder for point in made):
            raise RecipeError(f"sweep.arms.{arm}: two of its settings would share the folder {folder}")
        one.values |= {"seed": seed, "output_dir": str(folder)}
        if cut_from_train:  # the same held-out rows for all runs, unless the file says otherwise
            one.values["data"] = {"split_seed": seed} | one.values["data"]
        one.overridden |= own | set(setting)
        try:
            made.append(Point(arm, setting, seed, build(one)))
        except RecipeError as error:
            for line in error.problems:
                line = line.replace("override: ", "", 1)
                problems[f"sweep.arms.{arm}: {line}" if len(group.arms) > 1 else line] = None
    if problems:
        raise RecipeError(*problems)
    for axis in axes:
        lines = [of_setting[axis] for of_setting in unread if axis in of_setting]
        if not lines:
            continue
        for one, of_setting in zip(tried, unread, strict=True):
            if axis not in of_setting and _counts(one, axis):
                raise RecipeError(
                    f"sweep.arms.{arm}: {axis}: not all of the arm's settings read it, so some would be run twice; "
                    "make them arms"
                )
        drop_value(raw.values, axis)  # another arm's axis: here one setting many times over
        fewer = _points(raw, arm, own, group, root)
        return _Made(fewer.points, fewer.unread | {axis: lines[0]})
    return _Made(made, _unread_by_all(unread))


def _unread_by_all(unread: list[Unread]) -> Unread:
    """The keys that none reads, with the first refusal of each."""
    found = {}
    for key, line in unread[0].items():
        if all(key in other for other in unread):
            found[key] = line
    return found


def _check_rows(raw: RawRecipe, arm: str, axes: Mapping[str, object]) -> None:
    """Raises RecipeError if an axis would give each of its values other held-out rows than the rest."""
    for axis in axes:
        if not axis.startswith("data.") or (axis == "data.train" and _has_rows_apart(raw)):
            continue
        raise RecipeError(
            f"sweep.arms.{arm}: {axis}: each value has other held-out rows, so the best cannot be chosen by them; "
            "make them arms"
        )


def _has_rows_apart(raw: RawRecipe) -> bool:
    """Are the held-out rows a file's, not cut from what is trained on?"""
    data = raw.values.get("data")
    return isinstance(data, dict) and bool(data.get("validation"))


def _cuts_held_out_rows(raw: RawRecipe) -> bool:
    data = raw.values.get("data")
    return isinstance(data, dict) and not _has_rows_apart(raw) and data.get("validation_fraction") != 0


def _counts(raw: RawRecipe, key: str) -> bool:
    """Would the recipe be another without the key?"""
    without = copy.deepcopy(raw)
    drop_value(without.values, key)
    return build(without) != build(raw)


def _axes(values: Setting, model: Any, at: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, its values) wherever a list, or a range, stands in place of one value."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            continue
        takes_list = _takes_list(field.annotation)
        if _is_axis(value, takes_list):
            yield at + key, value
        elif isinstance(value, dict) and not takes_list:
            for inner in models_in(field.annotation)[:1]:
                yield from _axes(value, inner, f"{at}{key}.")


def _is_axis(value: Any, takes_list: bool) -> bool:
    """`takes_list`: the recipe has a list there anyway, so an axis is a list of lists."""
    if isinstance(value, dict):
        return set(value) == {RANGE}
    if not isinstance(value, list):
        return False
    if takes_list:
        return bool(value) and all(isinstance(one, list) for one in value)
    return True


def _takes_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list or any(_takes_list(part) for part in typing.get_args(annotation))


def _settings(axes: Setting, draws: int | None, arm: str, problems: Problems) -> list[Setting]:
    """All points of the grid, or `draws` of them at random: the same ones whenever the sweep is read again."""
    ranges = {dotted: axis[RANGE] for dotted, axis in axes.items() if isinstance(axis, dict)}
    lists = {dotted: axis for dotted, axis in axes.items() if dotted not in ranges}
    _check_axes(lists, ranges, draws, problems)
    if problems:
        return []
    if draws is None:
        return _grid(lists)
    source = random.Random(f"{arm} {sorted(axes)}")
    if not ranges:  # distinct points of the grid
        grid = _grid(lists)
        places = source.sample(range(len(grid)), min(draws, len(grid)))
        return [grid[place] for place in sorted(places)]
    drawn = []
    for _ in range(draws):
        point = {dotted: source.choice(axis) for dotted, axis in lists.items()}
        for dotted, (low, high) in ranges.items():
            value = math.exp(source.uniform(math.log(low), math.log(high)))
            point[dotted] = float(f"{value:.3g}")
        drawn.append({dotted: point[dotted] for dotted in axes})
    return drawn


def _check_axes(lists: Setting, ranges: Setting, draws: int | None, problems: Problems) -> None:
    for dotted, axis in lists.items():
        if not axis:
            problems[f"{dotted}: an empty list has no value to try"] = None
    for dotted, bounds in ranges.items():
        is_pair = isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
        if not is_pair or not 0 < bounds[0] < bounds[1]:
            problems[f"{dotted}: {RANGE} takes two numbers, 0 < low < high"] = None
        elif draws is None:
            problems[f"{dotted}: {RANGE} has no grid; say in sweep.draws how many points to try"] = None


def _grid(lists: Setting) -> list[Setting]:
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def slug(text: str) -> str:
    """As a folder's name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.") or "run"


def describe(setting: Setting) -> str:
    """`learning_rate=0.003, rank=8`; empty for an arm without axes. Whole keys where two end alike."""
    ends = [dotted.rpartition(".")[2] for dotted in setting]
    parts = []
    for (dotted, value), end in zip(setting.items(), ends, strict=True):
        name = end if ends.count(end) == 1 else dotted
        parts.append(f"{name}={_shown(value)}")
    return ", ".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return json.dumps(value)


def _name(setting: Setting) -> str:
    """What a run's folder begins with; empty for an arm without axes."""
    if not setting:
        return ""
    return f"{slug(describe(setting))[:100]}-"
