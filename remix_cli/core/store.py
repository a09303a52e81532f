"""The adapter folder: `remix_config.json` (what it is, what it belongs to) and `adapter.safetensors`.

Never an `adapter_config.json`: PEFT would load such a folder as a plain LoRA and silently drop the router.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from remix_cli.core.config import AdapterConfig
from remix_cli.core.description import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    BaseIdentity,
    Description,
    TrainedOn,
    check_shapes,
    read_description,
)
from remix_cli.core.layer import RoutedLinear
from remix_cli.core.patch import Adapter
from remix_cli.errors import ArtefactError
from remix_cli.storage import read_whole, sha256, write_json

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "BaseIdentity", "StoredAdapter", "TrainedOn", "load_stored", "save_adapter"]


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder's contents, checked."""

    config: AdapterConfig
    identity: BaseIdentity
    tensors: dict[str, Tensor]
    weights_sha256: str
    trained_on: TrainedOn


def fingerprint(model: nn.Module) -> str:
    """A hash of the base weights, adapted or not: names, shapes and up to 4,096 evenly spaced values each.

    Values are rounded to bfloat16 first, so a model loaded in bfloat16 or float32 has one fingerprint.
    """
    digest = hashlib.sha256()
    own: set[int] = set()
    for module in model.modules():
        if isinstance(module, RoutedLinear):
            own |= {id(module.lora_A), id(module.lora_B)}
    for name, parameter in model.named_parameters():
        if id(parameter) in own or name.endswith(("remix_router.weight", ".router.weight")):
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)][:4096].to("cpu", torch.bfloat16)
        digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(folder: Path, adapter: Adapter, identity: BaseIdentity, trained_on: TrainedOn) -> None:
    """Write both files into `folder`, which must exist. Equal adapters give equal bytes."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapter.tensors().items()}
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, Description(adapter.config, identity, sha256(weights), trained_on).to_dict())


def load_stored(folder: Path) -> StoredAdapter:
    """Read and check an adapter folder, which training may be replacing.

    Raises ArtefactError, naming the file, for anything amiss.
    """
    return read_whole(folder, _load_stored)


def _load_stored(folder: Path) -> StoredAdapter:
    described = read_description(folder)
    weights_file = folder / WEIGHTS_FILE
    try:
        data = weights_file.read_bytes()  # once, so that what is checked is what is used
    except OSError as error:
        raise ArtefactError(f"{weights_file}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != described.weights_sha256:
        raise ArtefactError(f"{weights_file}: damaged or replaced (sha256 differs from {CONFIG_FILE})")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ArtefactError(f"{weights_file}: not a safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtefactError(f"{weights_file}: tensor {name} holds non-finite values")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(folder, described.config.tensor_sizes(), shapes)
    return StoredAdapter(described.config, described.identity, tensors, described.weights_sha256, described.trained_on)
