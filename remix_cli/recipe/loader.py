"""YAML and overrides to a checked Recipe. All problems of a recipe are found and reported at once."""

import difflib
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ValidationError

from remix_cli.errors import RecipeError, shortened
from remix_cli.recipe.other_names import ANSWERS
from remix_cli.recipe.schema import Recipe

KeyPath = tuple[str | int, ...]
# More than any recipe needs, and read in a second: a longer file, or one whose aliases unfold to more, is none.
MAX_BYTES, MAX_ENTRIES = 200_000, 20_000
MAX_PROBLEMS = 50
ITEMS = {"eval.tasks": "task", "data.train": "path", "data.validation": "path"}  # lists, and their items' first key
POSITION = re.compile(r"[0-9]{1,9}")  # in a list


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-4` is a number, `010` is ten, `no` and `1:30` are text. No types but those of JSON."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (the base class declares it so)
    yaml_constructors = {
        f"tag:yaml.org,2002:{name}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{name}"]
        for name in ("map", "seq", "str")
    } | {None: yaml.SafeLoader.yaml_constructors[None]}


def _scalar(form: str, read: Callable[[str], Any], what: str) -> Callable[[yaml.SafeLoader, yaml.ScalarNode], Any]:
    """A tag makes no value of what would be none without it: `!!int abc`, `!!int 1_000`, `!!null 5`."""

    def construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        try:
            if not re.fullmatch(form, text):
                raise ValueError
            return read(text)
        except ValueError:  # int() refuses numbers of thousands of digits, too
            problem = f"{shortened(node.value, 30)!r} is not {what}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    return construct


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
# What a scalar of each type looks like, how it is read, what to call it, what it begins with.
_SCALARS: dict[str, tuple[str, Callable[[str], Any], str, list[str]]] = {
    "bool": ("true|True|false|False", lambda text: text in ("true", "True"), "true or false", list("tTfF")),
    "null": ("~|null|Null|", lambda text: None, "null", ["~", "n", "N", ""]),
    "int": ("[-+]?[0-9]+", int, "a whole number that can be read", list("-+0123456789")),
    "float": (_FLOAT, float, "a number", list("-+.0123456789")),
}
for _name, (_form, _value_of, _kind_of, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_form})$"), _first)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _scalar(_form, _value_of, _kind_of))


def _parse(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """A YAML text's value, and the line of each key. Raises yaml.YAMLError and RecursionError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        _collect_lines(node, (), lines)
        return (None if node is None else loader.construct_document(node)), lines
    finally:
        loader.dispose()


def _refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def load_recipe(path: Path, overrides: list[str] | tuple[str, ...] = (), *, stored: bool = False) -> Recipe:
    """The recipe at `path` with `key.path=value` overrides applied on top.

    `stored`: that of a run which is there already; what it says and nothing reads is left out, but for overrides.
    Raises RecipeError with one line per problem: file:line, dotted key, what is wrong, the nearest name.
    """
    raw = read_raw(path, overrides)
    if "sweep" in raw.values:
        raise RecipeError(f"{path}: has a `sweep` group, so it is for `remix sweep`; take it out to train one run")
    if stored:
        drop_unread(raw, keep=raw.overridden)
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
        if any(is_in(dotted, key) for key in self.overridden):
            return "override"
        at = tuple(int(part) if POSITION.fullmatch(part) else part for part in dotted.split("."))
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
        found = error.errors(include_url=False)
        lines = [_explain(problem, raw) for problem in found[:MAX_PROBLEMS]]
        if len(found) > MAX_PROBLEMS:
            lines.append(f"{raw.path}: and {len(found) - MAX_PROBLEMS:,} more problems")
        raise RecipeError(*lines) from None


def drop_unread(raw: RawRecipe, keep: Iterable[str] = ()) -> dict[str, str]:
    """Take out what says something although nothing reads it, but for `keep` and what lies below: key -> refusal."""
    dropped: dict[str, str] = {}
    while found := {key: line for key, line in _unread(raw).items() if not any(is_in(key, one) for one in keep)}:
        for key in found:  # what is wrong within a group shows first, what is wrong between groups then
            drop_value(raw.values, key)
        dropped |= found
    return dropped


def is_in(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")


def _unread(raw: RawRecipe) -> dict[str, str]:
    try:
        Recipe.model_validate(raw.values)
    except ValidationError as error:
        found = [problem for problem in error.errors(include_url=False) if problem["type"] == "unread"]
        return {".".join(map(str, _place_of(problem))): _explain(problem, raw) for problem in found}
    return {}


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
        values, lines = _parse(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: not valid YAML: {shortened(str(error.problem or error.context))}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{path}: not a readable YAML file: {reason}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is {_kind(values)}")
    return values, lines


def _collect_lines(node: yaml.Node | None, at: KeyPath, lines: dict[KeyPath, int]) -> None:
    """The line of each key below `node`, aliases unfolded. Raises yaml.YAMLError where there are too many."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                _refuse(key, f"a key should be a name, this is {_what(key)}")
            here = (*at, key.value)
            if here in lines:
                _refuse(key, f"{'.'.join(map(str, here))}: given twice (first in line {lines[here]})")
            _note_line(here, key, lines)
            _collect_lines(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_line((*at, index), value, lines)
            _collect_lines(value, (*at, index), lines)


def _what(key: yaml.Node) -> str:
    if isinstance(key, yaml.ScalarNode):
        return f"{shortened(key.value, 30) or 'nothing'}; put it in quotes"
    return "a list" if isinstance(key, yaml.SequenceNode) else "a mapping"


def _note_line(here: KeyPath, node: yaml.Node, lines: dict[KeyPath, int]) -> None:
    if len(lines) >= MAX_ENTRIES:
        _refuse(node, f"more than {MAX_ENTRIES:,} keys and entries, so not a recipe")
    lines[here] = node.start_mark.line + 1


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set one `key.path=value` in `values`; the value is read as YAML. Returns the dotted key."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ValueError(f"{override!r}: an override looks like train.max_steps=20")
    try:
        value, _ = _parse(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = f": {error.problem}" if isinstance(error, yaml.MarkedYAMLError) and error.problem else ""
        raise ValueError(f"{dotted}: cannot read {shortened(text, 60)!r} as a YAML value{reason}") from None
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


def drop_value(values: dict[str, Any], dotted: str) -> None:
    """Take out the key at `dotted`, which is there."""
    *parents, last = dotted.split(".")
    place: Any = values
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    del place[last]


def _index(items: list, part: str, dotted: str) -> int:
    if not POSITION.fullmatch(part) or int(part) >= len(items):
        raise ValueError(f"{dotted}: {part!r} is not a position in a list of {len(items)} (counted from 0)")
    return int(part)


def _place_of(problem: Any) -> KeyPath:
    context = problem.get("ctx", {})
    return context.get("at", (*problem["loc"], *context.get("below", ())))


def _explain(problem: Any, raw: RawRecipe) -> str:
    at = _place_of(problem)
    dotted = ".".join(map(str, at)) or "recipe"
    where = raw.where(dotted)
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        elsewhere = ANSWERS.get(str(at[-1]))
        return f"{where}: {dotted}: unknown key{f'; {elsewhere}' if elsewhere else _suggest(at)}"
    if kind == "missing":
        return f"{where}: {dotted}: required, but missing"
    message = problem["msg"].removeprefix("Value error, ")
    if kind in ("value_error", "conflict", "unread"):
        return f"{where}: {dotted}: {message}"
    message = re.sub(r"(a valid dictionary or )?(instance of|an instance of) [A-Za-z]+", "a mapping of keys", message)
    message = message.replace("Input should be", "should be")
    message = re.sub(r"\b(True|False)\b", lambda word: word[0].lower(), message)  # as YAML has them
    line = f"{where}: {dotted}: {message}, got {_kind(value)}"
    key = ITEMS.get(".".join(map(str, at[:-1])))
    if key and isinstance(value, str) and message.endswith("a mapping of keys"):
        return f"{line}; write {{{key}: {shortened(value)}}}"
    return line


def _kind(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "nothing" if value is None else shortened(str(value), 60)


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
