"""Keys of a recipe that a method or a task brings along: declared in its own file, they become part of the schema."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import Field


@dataclass(frozen=True)
class Setting:
    """One such key. `kind`: the type, in pydantic's words."""

    kind: Any
    default: Any
    description: str


def listed(names: Iterable[str]) -> str:
    """As a sentence has them."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def fields_of(brought: Iterable[dict[str, Setting]], readers: Callable[[str], list[str]]) -> dict[str, Any]:
    """The keys `brought` along, as pydantic's `create_model` takes them. `readers`: of a key, who reads it."""
    described = {}
    for settings in brought:
        for key, setting in settings.items():
            field = Field(setting.default, description=f"{listed(readers(key))}: {setting.description}")
            described[key] = (setting.kind, field)
    return described
