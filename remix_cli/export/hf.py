"""`--format hf`: a Hugging Face folder that stock transformers loads and runs as trained, routing included.

`modeling_remix.py` beside this file goes into the folder, with the base model's own class in its import. It is an
ordinary module here, so that linters and tests read what users get.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save
from torch import Tensor

from remix_cli.compat.transformers import imported, quiet
from remix_cli.core.trace import Trace
from remix_cli.errors import ArtefactError, RecipeError
from remix_cli.export.card import card
from remix_cli.export.holds import check_holds
from remix_cli.export.readback import check_logits, logits_differ, probe
from remix_cli.runs import LoadedRun
from remix_cli.storage import publish_folder

CODE = "modeling_remix.py"
CLASS = "RemixForCausalLM"
SHARD = "4GB"
# the end of a tensor's name in an adapter, and in modeling_remix.py
ROUTER_PARTS = {"router": "weight", "router_common": "common", "router_centres": "centres"}


@dataclass(frozen=True)
class Agreement:
    """Of a folder, loaded again, with the run it was written from."""

    difference: float  # of the logits under the same selections, relative, in norm
    same_choice: float  # share of the chosen LoRAs, over all decisions of all routers

    def __str__(self) -> str:
        return f"logits differ by {self.difference:.1e}, {self.same_choice:.1%} of the choices are the same"


def export_hf(run: LoadedRun, target: Path, *, reference_base: bool) -> Agreement:
    """Write the folder, whole or not at all, and read it back.

    `reference_base` names the base model instead of copying its weights. Raises RecipeError for what the format
    cannot hold, ArtefactError if the folder read back does not agree with the run, StorageError.
    """
    check_pool(run, "hf")
    classes = _base_classes(run)
    with publish_folder(target) as scratch:
        _write(run, scratch, classes, reference_base)
        (scratch / "README.md").write_text(card(run, "hf", {}), encoding="utf-8")
        return _check(run, scratch)


def check_pool(run: LoadedRun, form: str) -> None:
    """Raises RecipeError unless the format can hold the run, and its weights can be written out."""
    check_holds(form, run.stored.config.method)
    if run.recipe.model.quantization != "none":
        raise RecipeError(
            f"--format {form}: the run's base model is in {run.recipe.model.quantization}, and weights written from it "
            "would not be those it was trained on; use --format peft-experts, or evaluate it here"
        )


def _base_classes(run: LoadedRun) -> tuple[str, str]:
    """Names of the model's class and of that of its part without the head."""
    classes = type(run.model), type(run.model.base_model)
    for one in classes:
        if not hasattr(transformers, one.__name__):
            raise RecipeError(
                f"--format hf: {one.__name__} is not a class of transformers itself, so the folder could not load it"
            )
    return classes[0].__name__, classes[1].__name__


def _write(run: LoadedRun, folder: Path, classes: tuple[str, str], reference_base: bool) -> None:
    config = run.model.config.to_dict()
    module = CODE.removesuffix(".py")
    # A name of transformers itself: `transformers serve` looks nowhere else; this one comes to the class by auto_map.
    config["architectures"] = ["AutoModelForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"{module}.RemixConfig",
        "AutoModel": f"{module}.RemixModel",  # what engines build
        "AutoModelForCausalLM": f"{module}.{CLASS}",
    }
    config["model_type"] = f"remix_{config['model_type']}"
    config["remix"] = _description(run, reference_base)
    config["dtype"] = run.recipe.model.dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    code = (Path(__file__).parent / CODE).read_text(encoding="utf-8")
    whole, headless = classes
    code = code.replace("LlamaModel", headless).replace("LlamaForCausalLM", whole)
    (folder / CODE).write_text(code, encoding="utf-8")
    run.model.generation_config.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    tensors = _adapter_tensors(run)
    if reference_base:
        (folder / "remix.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        return
    state = base_state(run)
    for name in run.adapter.linears:
        for part in ("weight", "bias"):
            if f"{name}.{part}" in state:
                state[f"{name}.base.{part}"] = state.pop(f"{name}.{part}")
        state[f"{name}.weight"] = torch.zeros(1)  # modeling_remix.py says why
    save_torch_state_dict(state | tensors, folder, max_shard_size=SHARD)


def base_state(run: LoadedRun) -> dict[str, Tensor]:
    """The base model's tensors under its own names; a tied one under the first, as other programs look for it."""
    with run.adapter.disabled():
        state = run.model.state_dict()
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        if name.endswith(".remix_router.weight"):
            continue
        place = tensor.data_ptr(), tensor.shape
        if place in seen:
            continue
        if tensor.data_ptr():  # an empty tensor has no place
            seen.add(place)
        kept[name] = tensor
    return kept


def _description(run: LoadedRun, reference_base: bool) -> dict[str, Any]:
    c = run.stored.config
    return {
        "pool_size": c.pool_size,
        "active": c.active,
        "rank": c.rank,
        "scale": c.scale,
        "scope": c.scope,
        "level": c.level,
        "clusters": c.clusters,
        "linears": list(run.adapter.linears),
        "base_model": run.stored.identity.base_model if reference_base else None,
    }


def _adapter_tensors(run: LoadedRun) -> dict[str, Tensor]:
    """By the names of modeling_remix.py; LoRAs in the type that the model computes in, routers in float32."""
    dtype = next(run.model.parameters()).dtype
    tensors = {}
    for name, tensor in run.stored.tensors.items():
        module, _, part = name.rpartition(".")
        if part in ROUTER_PARTS:
            tensors[f"{module}.remix_router.{ROUTER_PARTS[part]}"] = tensor.contiguous()
        else:
            tensors[f"{name}.weight"] = tensor.to(dtype).contiguous()
    return tensors


@torch.no_grad()
def _check(run: LoadedRun, folder: Path) -> Agreement:
    """Load what was written, without the library, and compare it with the run on a prompt.

    Where the folder's routers choose otherwise, the run's weights take their place: in 16 bits two LoRAs that score
    nearly alike change places by rounding, and then whole LoRAs differ. How often they agree is counted apart.
    """
    loaded = load_exported(folder, next(run.model.parameters()).dtype).to(run.device)
    ids = probe(run)
    mask = torch.ones_like(ids)
    with run.adapter.tracing(Trace(prompt=mask.bool())) as trace:
        ours = run.model(input_ids=ids, use_cache=False).logits
    shared: list[Tensor] = []  # by router: how many columns of the pool both chose, (B T,)

    def impose(gates: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
        def after(_: Any, __: Any, own: Tensor) -> Tensor:
            both = ((own != 0) & (gates != 0)).sum(-1)
            shared.append(both.flatten())
            same = both == (gates != 0).sum(-1)
            return torch.where(same[..., None], own, gates.to(own.dtype))

        return after

    for name, decision in trace.decisions.items():
        loaded.get_submodule(f"{name}.remix_router").register_forward_hook(impose(decision.gates))
    theirs = loaded(input_ids=ids, attention_mask=mask, use_cache=False).logits
    config = run.stored.config
    in_common = torch.cat(shared).double() / config.rank  # of k LoRAs, by decision
    found = Agreement(logits_differ(ours, theirs), float(in_common.mean() / config.active))
    what = f"the exported model does not agree with the run ({found.same_choice:.1%} of the choices are the same)"
    check_logits(found.difference, loaded.dtype, what)
    choices = len(in_common) * config.active
    others = choices * (1 - found.same_choice)
    tolerated = 0.01 if loaded.dtype == torch.float32 else 0.1
    if others > max(1.5, choices * tolerated):  # one is never too many: there may be few decisions
        raise ArtefactError(f"the exported model does not agree with the run ({found})")
    return found


def load_exported(folder: Path, dtype: torch.dtype) -> Any:
    """The exported model by its own code, as transformers would load it."""
    with imported(folder / CODE) as module, quiet():
        model = getattr(module, CLASS)
        config = model.config_class.from_pretrained(folder)
        return model.from_pretrained(folder, config=config, dtype=dtype).eval()
