"""`--format peft-experts`: every LoRA of the pool as a stock PEFT adapter, and the router as its own file.

PEFT cannot route, so nothing of this folder is the trained model by itself: any k of its LoRAs, active together in
every block, are one selection that the routers could have made.
"""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from remix_cli.core.config import AdapterConfig
from remix_cli.core.store import StoredAdapter, load_stored
from remix_cli.export.holds import check_holds, check_peft_loads
from remix_cli.storage import publish_folder

README = """# LoRAs of a ReMix pool

Made from a routed adapter by `remix export --format peft-experts`; base model `{base}`.

- `lora-0` .. `lora-{last}`: stock PEFT adapters of rank {rank}, each scaled by omega = {scale:.6g}
  (`lora_alpha` = omega * r). Any {active} of them, active together, are one selection that the routers could make.
- `router.safetensors`: for each {place} the matrix P, (n, D) float32. For its input x the trained model
  activates the {active} LoRAs with the largest P x, {level}.

PEFT does not read the router, so loading one folder, or all of them, is NOT the trained model, which chooses
{active} of {pool} by the router. `remix eval` and the library run it as trained.
"""


def export_peft_experts(adapter_folder: Path, target: Path) -> Path:
    """Write the folder `target`, whole or not at all. Raises ArtefactError, RecipeError, StorageError."""
    stored = load_stored(adapter_folder)
    check_holds("peft-experts", stored.config.method)
    check_peft_loads("peft-experts", stored)
    with publish_folder(target) as scratch:
        for i in range(stored.config.pool_size):
            _write_lora(scratch / f"lora-{i}", stored, i)
        routers = {name: x for name, x in stored.tensors.items() if not name.endswith((".lora_A", ".lora_B"))}
        (scratch / "router.safetensors").write_bytes(save(routers, metadata={"format": "pt"}))
        (scratch / "README.md").write_text(_readme(stored), encoding="utf-8")
    return target


def _readme(stored: StoredAdapter) -> str:
    c = stored.config
    return README.format(
        base=stored.identity.base_model,
        place="block" if stored.config.scope == "block" else "adapted layer",
        level=_level(c),
        last=c.pool_size - 1,
        rank=c.rank,
        scale=c.scale,
        active=c.active,
        pool=c.pool_size,
    )


def _level(c: AdapterConfig) -> str:
    if c.level == "token":
        return "token by token"
    if not c.clusters:
        return "once for a sequence, x being the mean over its prompt"
    return (
        "once for a sequence. There x is the row of `router_centres` whose product with m / |m| - `router_common` "
        "is largest, m being the mean over the prompt"
    )


def _write_lora(folder: Path, stored: StoredAdapter, i: int) -> None:
    config: AdapterConfig = stored.config
    rows = slice(i * config.rank, (i + 1) * config.rank)  # of the stacked pool
    parts = {}
    for name in stored.tensors:
        if name.endswith(".lora_A"):
            linear = name.removesuffix(".lora_A")
            parts[linear] = (stored.tensors[name][rows], stored.tensors[f"{linear}.lora_B"][:, rows])
    folder.mkdir()
    alpha = config.scale * config.rank
    write_peft_lora(folder, parts, stored.identity.base_model, config.rank, alpha, config.dropout)


def write_peft_lora(
    folder: Path, parts: dict[str, tuple[Tensor, Tensor]], base: str, rank: int, alpha: float, dropout: float = 0.0
) -> None:
    """A stock PEFT LoRA: A (r, D_in) and B (D_out, r) by the name of the linear layer, scaled by alpha / r."""
    tensors = {}
    for module, (lora_a, lora_b) in parts.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a.cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b.cpu().contiguous()
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(parts),
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
