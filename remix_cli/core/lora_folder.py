"""One LoRA as a folder, PEFT's (`adapter_config.json`) or of a plain LoRA of ours (`remix_config.json`); and a pool
made of several.

A LoRA adds s B A x to a linear layer, with s = lora_alpha / r, or lora_alpha / sqrt(r) under `use_rslora`. A pool adds
omega sum_i B_i A_i x over the LoRAs i in use, with one constant omega for all. So LoRA i of the pool has A_i as it is
and B_i times s_i / omega: in use it adds exactly what it added by itself, whatever n, k and omega are, and with k = n
the pool adds the sum of all LoRAs, as PEFT does with all of them active.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remix_cli.core.description import CONFIG_FILE, BaseIdentity, Shapes, read_description, read_shapes
from remix_cli.errors import ArtefactError

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names
# What makes a PEFT folder more, or other, than s B A x on linear layers.
BEYOND = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "arrow_config",
)
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start that take a part out of W


@dataclass(frozen=True)
class LoraFolder:
    """What a folder says of its one LoRA, read without torch."""

    path: Path
    described_in: str  # which of its files
    rank: int
    scale: float  # s
    base_model: str | None  # its name, where the folder has one
    identity: BaseIdentity | None  # ours know more of their base model
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # by linear layer, those of A (r, D_in) and B (D_out, r)


def is_peft(folder: Path) -> bool:
    return os.path.isfile(folder / PEFT_CONFIG)


def read_lora(folder: Path) -> LoraFolder:
    """Raises ArtefactError, a line for each thing that makes it no plain LoRA."""
    return _read_peft(folder) if is_peft(folder) else _read_ours(folder)


def _read_ours(folder: Path) -> LoraFolder:
    described = read_description(folder)
    config = described.config
    if config.pool is None or config.routed or config.residual:
        raise ArtefactError(
            f"{folder / CONFIG_FILE}: method is {config.method}, and one LoRA is needed here: a PEFT folder, or a run "
            "of lora or rslora"
        )
    shapes = _by_linear(folder, read_shapes(folder), "", "")
    identity = described.identity
    return LoraFolder(folder, CONFIG_FILE, config.rank, config.scale, identity.base_model, identity, shapes)


def _read_peft(folder: Path) -> LoraFolder:
    path = folder / PEFT_CONFIG
    said = read_peft_config(folder)
    if said.get("peft_type") != "LORA":
        raise ArtefactError(f"{path}: peft_type is {said.get('peft_type')!r}, and only LORA can be read here")
    rank, alpha, base = said.get("r"), said.get("lora_alpha"), said.get("base_model_name_or_path")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ArtefactError(f"{path}: r is {rank!r}; a whole number of 1 or more is needed")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ArtefactError(f"{path}: lora_alpha is {alpha!r}; a number is needed")
    problems = [f"{path}: {key} is {said[key]!r}; only plain LoRAs can be read" for key in BEYOND if said.get(key)]
    if said.get("bias", "none") != "none":
        problems.append(f"{path}: bias is {said['bias']!r}; only plain LoRAs, of bias none, can be read")
    start = said.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        problems.append(
            f"{path}: init_lora_weights is {start!r}, which changes the base model too; save it with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if problems:
        raise ArtefactError(*problems)
    if not (folder / PEFT_WEIGHTS).is_file():
        raise ArtefactError(f"{folder / PEFT_WEIGHTS}: missing; pickled weights (.bin) are not read: save it again")
    shapes = _by_linear(folder, read_shapes(folder, PEFT_WEIGHTS), PREFIX, ".weight")
    scale = alpha / math.sqrt(rank) if said.get("use_rslora") else alpha / rank
    return LoraFolder(folder, PEFT_CONFIG, rank, scale, base if isinstance(base, str) and base else None, None, shapes)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Raises ArtefactError."""
    path = folder / PEFT_CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error})") from None
    return said


def _by_linear(
    folder: Path, shapes: Shapes, prefix: str, suffix: str
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of A and B by linear layer, of tensors `<prefix><linear>.lora_A<suffix>`. Raises ArtefactError."""
    ends = {f".lora_A{suffix}": 0, f".lora_B{suffix}": 1}
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        end = next((end for end in ends if name.startswith(prefix) and name.endswith(end)), None)
        if end is None:
            raise ArtefactError(f"{folder}: holds a tensor {name}, which is of no LoRA on a linear layer")
        found.setdefault(name.removeprefix(prefix).removesuffix(end), {})[ends[end]] = shape
    single = next((linear for linear, parts in found.items() if len(parts) < 2), None)
    if single is not None or not found:
        raise ArtefactError(f"{folder}: {single or 'no layer at all'} has no pair of lora_A and lora_B")
    return {linear: (parts[0], parts[1]) for linear, parts in found.items()}


def load_pool(loras: Sequence[LoraFolder], omega: float) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a pool of these LoRAs, weighted by `omega`: `<linear>.lora_A` (n r, D_in) and `.lora_B`
    (D_out, n r), float32, by the module's docstring; and the SHA-256 of each weights file.

    The LoRAs must be of one rank and on the same linears. Raises ArtefactError for a file that cannot be read or holds
    non-finite values.
    """
    import torch

    read = [_load(lora) for lora in loras]
    tensors: dict[str, Any] = {}
    for linear in loras[0].shapes:
        parts = [by_linear[linear] for by_linear, _ in read]
        tensors[f"{linear}.lora_A"] = torch.cat([a for a, _ in parts])
        scaled = [b * (lora.scale / omega) for lora, (_, b) in zip(loras, parts, strict=True)]
        tensors[f"{linear}.lora_B"] = torch.cat(scaled, dim=1)
    return tensors, [digest for _, digest in read]


def _load(lora: LoraFolder) -> tuple[dict[str, tuple[Any, Any]], str]:
    """A and B by linear layer, float32; the SHA-256 of their file."""
    from remix_cli.core.store import load_stored

    if lora.described_in == CONFIG_FILE:
        stored = load_stored(lora.path)
        tensors, digest, prefix, suffix = stored.tensors, stored.weights_sha256, "", ""
    else:
        tensors, digest = _load_peft(lora.path / PEFT_WEIGHTS)
        prefix, suffix = PREFIX, ".weight"
    found = {}
    for linear in lora.shapes:
        a, b = (tensors[f"{prefix}{linear}.lora_{part}{suffix}"].float() for part in "AB")
        found[linear] = (a, b)
    return found, digest


def _load_peft(path: Path) -> tuple[dict[str, Any], str]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        tensors = load(data)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error})") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtefactError(f"{path}: tensor {name} holds non-finite values")
    return tensors, hashlib.sha256(data).hexdigest()
