"""The methods by name. Everything else about a method stands in its own file."""

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remix_cli.methods.base import Method

METHODS = {
    "remix": "remix_cli.methods.remix:Remix",
    "mixlora": "remix_cli.methods.mixlora:MixLora",
    "hydralora": "remix_cli.methods.hydralora:HydraLora",
    "milora": "remix_cli.methods.milora:MiLora",
    "remix_modules": "remix_cli.methods.remix_modules:RemixModules",
    "reslora": "remix_cli.methods.reslora:ResLora",
    "lora": "remix_cli.methods.lora:Lora",
    "rslora": "remix_cli.methods.rslora:RsLora",
    "dora": "remix_cli.methods.dora:Dora",
    "ia3": "remix_cli.methods.ia3:Ia3",
    "vblora": "remix_cli.methods.vblora:VbLora",
    "prefix": "remix_cli.methods.prefix:Prefix",
    "prompt": "remix_cli.methods.prompt:Prompt",
    "p_tuning": "remix_cli.methods.p_tuning:PTuning",
    "none": "remix_cli.methods.none:Nothing",
}


def method_named(name: str) -> "Method":
    """Raises KeyError for a name that is not in `METHODS`."""
    return pkgutil.resolve_name(METHODS[name])()


def methods_by_name() -> "dict[str, Method]":
    return {name: method_named(name) for name in METHODS}
