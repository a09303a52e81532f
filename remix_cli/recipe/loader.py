"""YAML and overrides to a checked Recipe. All problems of a recipe are found and reported at once."""

import difflib
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from remix_cli.errors import RecipeError
from remix_cli.recipe.schema import Recipe

KeyPath = tuple[str | int, ...]
MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-4` is a number, `010` is ten, `no` and `1:30` are text. Safe types only."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (the base class declares it so)


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _real(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^{_FLOAT}$"), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)


def load_recipe(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe at `path` with `key.path=value` overrides applied on top.

    Raises RecipeError with one line per problem: file:line, dotted key, what is wrong, the nearest name.
    """
    raw = read_raw(path, overrides)
    if "sweep" in raw.values:
        raise RecipeError(f"{path}: has a `sweep` group, so it is for `remix sweep`; take it out to train one run")
    return build(raw)


@dataclass
class RawRecipe:
    """A recipe's mapping before it is checked, and where each key came from, for messages."""

    path: Path
    values: dict[str, Any]
    lines: dict[KeyPath, int]
    overridden: set[str]

    def where(self, dotted: str) -> str:
        """`file:line` of a dotted key or of the group that would hold it, or `override`."""
        if any(dotted == key or dotted.startswith(f"{key}.") for key in self.overridden):
            return "override"
        at = tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
        known = next((at[:i] for i in range(len(at), 0, -1) if at[:i] in self.lines), None)
        return f"{self.path}:{self.lines[known]}" if known else str(self.path)


def read_raw(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> RawRecipe:
    """The mapping at `path` with the overrides in it. Raises RecipeError."""
    values, lines = _read(path)
    raw = RawRecipe(path, values, lines, set())
    problems = []
    for override in overrides:
        try:
            raw.overridden.add(_apply_override(values, override))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        try:
            build(raw)
        except RecipeError as error:
            problems += error.problems
        raise RecipeError(*problems)
    return raw


def build(raw: RawRecipe) -> Recipe:
    """The checked recipe. Raises RecipeError with one line per problem."""
    try:
        return Recipe.model_validate(raw.values)
    except ValidationError as error:
        raise RecipeError(*(_explain(problem, raw) for problem in error.errors())) from None


def dump(recipe: Recipe) -> str:
    """The complete recipe as YAML; loading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The YAML mapping and the line of each key. Raises RecipeError."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES} bytes, so not a recipe")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        lines: dict[KeyPath, int] = {}
        _collect_lines(node, (), lines, path)
        values = _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: not valid YAML: {error.problem or error.context}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{path}: not a readable YAML file: {reason}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is {_kind(values)}")
    return values, lines


def _collect_lines(node: yaml.Node | None, at: KeyPath, lines: dict[KeyPath, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            if here in lines:
                dotted = ".".join(map(str, here))
                raise RecipeError(
                    f"{path}:{key.start_mark.line + 1}: {dotted}: given twice (first in line {lines[here]})"
                )
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _collect_lines(value, (*at, index), lines, path)


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set one `key.path=value` in `values`; the value is read as YAML. Returns the dotted key."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ValueError(f"{override!r}: an override looks like train.max_steps=20")
    try:
        value = _Loader(text).get_single_data()
    except yaml.YAMLError:
        raise ValueError(f"{dotted}: cannot read {text!r} as a YAML value") from None
    set_value(values, dotted, value)
    return dotted


def set_value(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Put `value` at `dotted` in nested mappings and lists. Raises ValueError if there is no such place."""
    *parents, last = dotted.split(".")
    place: Any = values
    for depth, part in enumerate(parents):
        if isinstance(place, list):
            place = place[_index(place, part, dotted)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise ValueError(f"{dotted}: {'.'.join(parents[: depth + 1])} holds no keys")
    if isinstance(place, list):
        place[_index(place, last, dotted)] = value
    else:
        place[last] = value


def _index(items: list, part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ValueError(f"{dotted}: {part!r} is not a position in a list of {len(items)} (counted from 0)")
    return int(part)


def _explain(problem: Any, raw: RawRecipe) -> str:
    context = problem.get("ctx", {})
    at: KeyPath = context.get("at", (*problem["loc"], *context.get("below", ())))
    dotted = ".".join(map(str, at)) or "recipe"
    where = raw.where(dotted)
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"{where}: {dotted}: unknown key{_suggest(at)}"
    if kind == "missing":
        return f"{where}: {dotted}: required, but missing"
    message = problem["msg"].removeprefix("Value error, ")
    if kind in ("value_error", "conflict"):
        return f"{where}: {dotted}: {message}"
    message = message.replace("Input should be", "should be")
    return f"{where}: {dotted}: {message}, got {_kind(value)}"


def _kind(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "nothing" if value is None else str(value)


def all_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, list positions left out."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in models_in(field.annotation):
            keys += all_keys(inner, f"{prefix}{name}.")
    return keys


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def _suggest(at: KeyPath) -> str:
    """The nearest valid key: in the same group first, then anywhere by its last name."""
    plain = [str(part) for part in at if not isinstance(part, int)]
    group, name = plain[:-1], plain[-1]
    keys = [key.split(".") for key in all_keys()]
    siblings = [key[-1] for key in keys if key[:-1] == group]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {'.'.join([*map(str, at[:-1]), close[0]])}?"
    elsewhere = {key[-1]: ".".join(key) for key in keys if key[:-1] != group}
    close = difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.8)
    if close:
        return f"; did you mean {elsewhere[close[0]]}?"
    return f"; valid here: {', '.join(siblings)}" if siblings else ""
