"""What an adapter folder says about itself, read and checked without torch: `remix_config.json`.

Since format 3 the file carries a hash of itself; those of format 2 are read without one.
"""

import json
import struct
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from remix_cli.core.config import AdapterConfig, Sizes
from remix_cli.errors import ArtefactError
from remix_cli.storage import is_sealed, seal

FORMAT = 3
UNSEALED = 2  # the last format without a hash of itself
CONFIG_FILE = "remix_config.json"
WEIGHTS_FILE = "adapter.safetensors"
MAX_HEADER = 100_000_000  # bytes; as the safetensors library has it

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name


@dataclass(frozen=True)
class BaseIdentity:
    """The model an adapter belongs to: its name, for people, hashes of its weights and tokenizer, and how both work.

    Earlier versions did not write the last two. `tokenizer_fingerprint` is "" where no tokenizer was at hand.
    """

    base_model: str
    base_dtype: str
    base_fingerprint: str
    tokenizer_fingerprint: str
    base_settings: dict[str, Any] | None = None  # of its config, those that change the forward pass
    tokenizer_probe: str | None = None  # hash of the tokens of a fixed text

    def __post_init__(self) -> None:
        values = asdict(self)
        settings = values.pop("base_settings")
        probe = values.pop("tokenizer_probe")
        if not all(isinstance(value, str) for value in values.values()) or not isinstance(probe, str | None):
            raise ValueError("the base model's name and hashes must be text")
        if not isinstance(settings, dict | None):
            raise ValueError("base_settings must be an object")

    def differences(self, now: "BaseIdentity") -> list[str]:
        """In what the base `now` is another one. What only one of the two knows of itself is not compared."""
        different = []
        settings_now = now.base_settings or {}
        changed = []
        for key, value in (self.base_settings or {}).items():
            if key in settings_now and settings_now[key] != value:
                changed.append(f"{key} was {value}, is {settings_now[key]}")
        if changed:
            different.append(f"base model ({'; '.join(changed)})")
        elif self.base_fingerprint != now.base_fingerprint:
            different.append("base model")
        probes = {self.tokenizer_probe, now.tokenizer_probe} - {None}
        vocabularies = {self.tokenizer_fingerprint, now.tokenizer_fingerprint} - {""}
        if len(probes) > 1 or len(vocabularies) > 1:
            different.append("tokenizer")
        return different


@dataclass(frozen=True)
class TrainedOn:
    """Hashes of what an adapter was trained on; None where an earlier version did not say."""

    recipe: str | None = None
    data: str | None = None  # of the encoded training rows
    held_out: str | None = None  # of what the held-out rows say

    def __post_init__(self) -> None:
        if not all(isinstance(value, str | None) for value in asdict(self).values()):
            raise ValueError("the hashes of trained_on must be text")


@dataclass(frozen=True)
class Description:
    config: AdapterConfig
    identity: BaseIdentity
    weights_sha256: str
    trained_on: TrainedOn = TrainedOn()

    def to_dict(self) -> dict[str, Any]:
        values = {"format": FORMAT, "adapter": self.config.to_dict(), **asdict(self.identity)}
        return seal(values | {"trained_on": asdict(self.trained_on), "weights_sha256": self.weights_sha256})


def read_description(folder: Path) -> Description:
    """Raises ArtefactError, naming the file, for anything amiss."""
    path = folder / CONFIG_FILE
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ArtefactError(f"{folder / name}: missing; {folder} is not a remix adapter folder")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if described["format"] not in (FORMAT, UNSEALED):
            raise ArtefactError(f"{path}: format {described['format']}, this version reads {UNSEALED} and {FORMAT}")
        if not is_sealed(described) and (described["format"] == FORMAT or "sha256" in described):
            raise ArtefactError(f"{path}: damaged or changed (its sha256 differs from what it says of itself)")
        config = AdapterConfig.from_dict(described["adapter"])
        identity = BaseIdentity(**_known(BaseIdentity, described))
        trained_on = TrainedOn(**_known(TrainedOn, described.get("trained_on", {})))
        return Description(config, identity, described["weights_sha256"], trained_on)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtefactError(f"{path}: not a readable adapter description ({error})") from None


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `kind` among `values`. Raises KeyError if one without a default is missing."""
    return {f.name: values[f.name] for f in fields(kind) if f.name in values or f.default is MISSING}


def check_shapes(folder: Path, sizes: Sizes, shapes: Shapes) -> None:
    """Raises ArtefactError unless the weights have the `sizes` that their description declares.

    A model is built by those, so no size is believed that the weights do not bear out.
    """
    problem = misfit(sizes, shapes)
    if problem:
        raise ArtefactError(f"{folder / CONFIG_FILE}: does not describe {WEIGHTS_FILE} beside it ({problem})")


def misfit(sizes: Sizes, shapes: Shapes) -> str | None:
    """In what tensors of these shapes are not of these sizes, each of which some tensor must have; None if they are."""
    for end, wanted in sizes.items():
        found = {name: shape for name, shape in shapes.items() if name.endswith(end)}
        if not found:
            return f"no tensor named *{end}"
        for name, shape in found.items():
            if not _has_size(shape, wanted):
                return f"{name} is {shape}, declared {tuple('any' if size is None else size for size in wanted)}"
    return None


def _has_size(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(size is None or size == found for size, found in zip(wanted, shape, strict=True))


def read_shapes(folder: Path, name: str = WEIGHTS_FILE) -> Shapes:
    """From the head of the weights file alone. Raises ArtefactError."""
    path = folder / name
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            tensors = json.loads(file.read(length))
        return {key: tuple(entry["shape"]) for key, entry in tensors.items() if key != "__metadata__"}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{path}: not a safetensors file ({error})") from None
