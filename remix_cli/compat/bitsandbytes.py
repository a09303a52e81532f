"""bitsandbytes on CPUs, what it says there, and its 4-bit layers on several processes."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def keep_differentiable(model: Any) -> None:
    """Keep the 4-bit layers of `model` from packing their weights for inference on a CPU.

    On CPUs with AVX-512 bf16 any pass in evaluation mode packs them, for good, into a layout whose kernel has no
    backward pass (nn/modules.py, `Linear4bit.forward`): what trains afterwards has wrong gradients and no error. Seen
    with bitsandbytes 0.46 to 0.50.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def no_advice() -> None:
    """Silence two loggers, from now on.

    backends/cpu/ops.py advises in every process, on some CPUs, to install what would fetch native code;
    autograd/_functions.py says in every 8-bit layer of every pass that it rounds from other than 16-bit numbers.
    Seen with bitsandbytes 0.50.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class PackedLayer:
    """A 4-bit layer but for its weight and bias."""

    width_in: int
    width_out: int
    has_bias: bool
    compute_dtype: torch.dtype
    state: Any  # bitsandbytes' QuantState: scales, their scales, the code


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The 4-bit layers of `model` by name; from now on each keeps its weight's quantisation state itself.

    The state is an attribute of the weight, which is lost where the weight becomes another tensor (a shard of FSDP's):
    nn/modules.py, `fix_4bit_weight_quant_state_from_module`, then takes that of the layer. Seen with bitsandbytes 0.50.

    The weights' bytes are called 16-bit numbers from now on, as `bnb_4bit_quant_storage` would have it: up to torch
    2.11 at least, FSDP2 makes every shard a parameter that may learn, which bytes may not
    (_fsdp_param.py, `_init_sharded_param`). Nothing computes with them as they stand.
    """
    found = {}
    for name, module in _four_bit(model):
        module.quant_state = module.weight.quant_state
        module.weight.data = module.weight.data.flatten().view(torch.bfloat16).unsqueeze(1)
        found[name] = PackedLayer(
            module.in_features,
            module.out_features,
            module.bias is not None,
            module.compute_dtype,
            module.quant_state,
        )
    return found


def put_packed_layers(model: nn.Module, layers: dict[str, PackedLayer]) -> None:
    """Put 4-bit layers without memory (torch's meta device) in the places of `layers`."""
    if not layers:
        return
    from bitsandbytes.nn import Linear4bit

    for name, layer in layers.items():
        made = Linear4bit(
            layer.width_in, layer.width_out, layer.has_bias, layer.compute_dtype, device=torch.device("meta")
        )
        made.requires_grad_(False)
        made.quant_state = layer.state
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    keep_differentiable(model)


def move_states(model: nn.Module, device: torch.device) -> None:
    """The quantisation states of 4-bit layers, which `to` moves with the weights only."""
    for _, module in _four_bit(model):
        module.quant_state.to(device)


def _four_bit(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
