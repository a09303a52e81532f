"""JSON of ours that comes back from a disk: what it holds is checked by kind before any of it is used."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from remix_cli.errors import ArtefactError

T = TypeVar("T")
Document = dict[str, Any]  # a JSON object
Kinds = dict[str, type | UnionType]  # of what a JSON object must hold


class Damaged(ValueError):
    """What is wrong with an object, in a few words; who read it knows the file and how to mend it."""


def read_object(path: Path) -> Document:
    """Raises ArtefactError if the file does not hold a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ArtefactError(f"{path}: damaged: a JSON object was written there")
    return found


def check_kinds(found: Any, kinds: Kinds) -> Document:
    """`found`, if it is an object with these keys. Raises Damaged, which names the first that is missing or wrong."""
    for key in kinds:
        if not isinstance(found, dict) or key not in found:
            raise Damaged(f"{key} is missing or damaged")
    for key, kind in kinds.items():
        if not isinstance(found[key], kind):
            raise Damaged(f"{key} is missing or damaged")
    return found


def read_fields(kind: type[T], found: Any) -> T:
    """A flat dataclass from the object that it was written as; keys that it does not have are left out.

    A field with a default may be absent: the files of earlier versions lack it. Raises Damaged.
    """
    hints = get_type_hints(kind)
    kinds: Kinds = {}
    for field in fields(kind):  # type: ignore[arg-type]
        needed = field.default is MISSING and field.default_factory is MISSING
        if needed or (isinstance(found, dict) and field.name in found):
            kinds[field.name] = _as_asked_of_json(hints[field.name])
    checked = check_kinds(found, kinds)
    return kind(**{name: checked[name] for name in kinds})


def _as_asked_of_json(hint: Any) -> Any:
    """For `isinstance`: a number without a fraction is a float, too, and what a list holds is not looked at."""
    if isinstance(hint, UnionType):
        return tuple(_as_asked_of_json(part) for part in get_args(hint))
    if hint is float:
        return int | float
    return get_origin(hint) or hint
