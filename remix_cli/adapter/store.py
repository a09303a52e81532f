"""The adapter folder: `remix_config.json` (what it is, what it belongs to) and `adapter.safetensors`.

Never an `adapter_config.json`: PEFT would load such a folder as a plain LoRA and silently drop the router.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from remix_cli.adapter.config import AdapterConfig
from remix_cli.adapter.layer import RoutedLinear
from remix_cli.adapter.patch import Adapter
from remix_cli.errors import ArtefactError
from remix_cli.storage import read_whole, sha256, write_json

FORMAT = 2
CONFIG_FILE = "remix_config.json"
WEIGHTS_FILE = "adapter.safetensors"


@dataclass(frozen=True)
class BaseIdentity:
    """The model an adapter belongs to: its name, for people, and hashes of its weights and tokenizer."""

    base_model: str
    base_dtype: str
    base_fingerprint: str
    tokenizer_fingerprint: str


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder's contents, checked."""

    config: AdapterConfig
    identity: BaseIdentity
    tensors: dict[str, Tensor]
    weights_sha256: str


def fingerprint(model: nn.Module) -> str:
    """A hash of the base weights, adapted or not: names, shapes and up to 4,096 evenly spaced values each.

    Values are rounded to bfloat16 first, so a model loaded in bfloat16 or float32 has one fingerprint.
    """
    digest = hashlib.sha256()
    own = {id(p) for m in model.modules() if isinstance(m, RoutedLinear) for p in (m.lora_A, m.lora_B)}
    for name, parameter in model.named_parameters():
        if id(parameter) in own or name.endswith(("remix_router.weight", ".router.weight")):
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)][:4096].to("cpu", torch.bfloat16)
        digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(folder: Path, adapter: Adapter, identity: BaseIdentity) -> None:
    """Write both files into `folder`, which must exist. Equal adapters give equal bytes."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapter.parameters().items()}
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(save(tensors, metadata={"format": "pt"}))
    described = {
        "format": FORMAT,
        "adapter": adapter.config.to_dict(),
        **asdict(identity),
        "weights_sha256": sha256(weights),
    }
    write_json(folder / CONFIG_FILE, described)


def load_stored(folder: Path) -> StoredAdapter:
    """Read and check an adapter folder, which training may be replacing.

    Raises ArtefactError, naming the file, for anything amiss.
    """
    return read_whole(folder, _load_stored)


def _load_stored(folder: Path) -> StoredAdapter:
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (config_file, weights_file):
        if not path.is_file():
            raise ArtefactError(f"{path}: missing; {folder} is not a remix adapter folder")
    try:
        described = json.loads(config_file.read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise ArtefactError(f"{config_file}: format {described['format']}, this version reads {FORMAT}")
        config = AdapterConfig.from_dict(described["adapter"])
        identity = BaseIdentity(**{field.name: str(described[field.name]) for field in fields(BaseIdentity)})
        expected = described["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{config_file}: not a readable adapter description ({error})") from None
    data = weights_file.read_bytes()  # once, so that what is checked is what is used
    if hashlib.sha256(data).hexdigest() != expected:
        raise ArtefactError(f"{weights_file}: damaged or replaced (sha256 differs from {CONFIG_FILE})")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ArtefactError(f"{weights_file}: not a safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtefactError(f"{weights_file}: tensor {name} holds non-finite values")
    return StoredAdapter(config, identity, tensors, expected)
