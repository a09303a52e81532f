"""What an adapter folder says about itself, read and checked without torch: `remix_config.json`.

Since format 3 the file carries a hash of itself; those of format 2 are read without one.
"""

import json
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from remix_cli.adapter.config import AdapterConfig
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
    """The model an adapter belongs to: its name, for people, and hashes of its weights and tokenizer."""

    base_model: str
    base_dtype: str
    base_fingerprint: str
    tokenizer_fingerprint: str

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in asdict(self).values()):
            raise ValueError("the base model's name and hashes must be text")


@dataclass(frozen=True)
class Description:
    config: AdapterConfig
    identity: BaseIdentity
    weights_sha256: str

    def to_dict(self) -> dict[str, Any]:
        values = {"format": FORMAT, "adapter": self.config.to_dict(), **asdict(self.identity)}
        return seal(values | {"weights_sha256": self.weights_sha256})


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
        identity = BaseIdentity(**{field.name: described[field.name] for field in fields(BaseIdentity)})
        return Description(config, identity, described["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtefactError(f"{path}: not a readable adapter description ({error})") from None


def check_shapes(folder: Path, config: AdapterConfig, shapes: Shapes) -> None:
    """Raises ArtefactError unless the weights have the sizes that `config` declares, for a model is built by those."""
    problem = config.misfit(shapes)
    if problem:
        raise ArtefactError(f"{folder / CONFIG_FILE}: does not describe {WEIGHTS_FILE} beside it ({problem})")


def read_shapes(folder: Path) -> Shapes:
    """From the head of the weights file alone. Raises ArtefactError."""
    path = folder / WEIGHTS_FILE
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            tensors = json.loads(file.read(length))
        return {name: tuple(entry["shape"]) for name, entry in tensors.items() if name != "__metadata__"}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{path}: not a safetensors file ({error})") from None
