"""The frozen base model shared out over the processes, by torch's FSDP2: each layer is gathered while it runs.

Adapters and routers stay whole on every process and keep their own type: they are a hundredth of the model, their
gradients are summed once a step (gradient_sums.py), and checkpoints need no gathering. Every forward and backward
pass is now a collective, so all processes must make equally many: a process without a micro-batch of its own repeats
the step's first one at no weight, and one with fewer held-out rows repeats a row.

The first process alone reads the weights; the others have the same modules without memory (torch's meta device) until
their share comes, layer by layer. So a machine holds the base once, whatever the number of its processes, and no card
ever holds more than its share and one layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from remix_cli.compat.accelerate import asks_for_deepspeed, take_fsdp_launch
from remix_cli.compat.bitsandbytes import move_states, packed_layers, put_packed_layers
from remix_cli.core.patch import Adapter, decoder_layers
from remix_cli.core.store import BaseIdentity
from remix_cli.errors import ArtefactError, RecipeError
from remix_cli.models import identify, load_model
from remix_cli.models.skeleton import skeleton
from remix_cli.recipe import Recipe
from remix_cli.recipe.loader import RawRecipe, build


def as_launched(recipe: Recipe) -> Recipe:
    """`recipe` with `train.shard_base` as accelerate's launch file for FSDP2 has it. Raises RecipeError."""
    if asks_for_deepspeed():
        raise RecipeError(
            "train.shard_base: accelerate was told to use DeepSpeed, which is not used here; launch with "
            "configs/accelerate/fsdp2.yaml, which shares the base model out as ZeRO-3 does"
        )
    asked = take_fsdp_launch()
    if asked is None:
        return recipe
    if asked.version != 2:
        raise RecipeError(
            "train.shard_base: accelerate was told to use FSDP 1, which would flatten adapters and base into one; set "
            "fsdp_version: 2 in the launch file"
        )
    values = recipe.model_dump(exclude_unset=True)
    values.setdefault("train", {})["shard_base"] = "offload" if asked.offload else True
    return build(RawRecipe(Path("the launch file"), values, {}, set()))


def check_launch(recipe: Recipe, processes: int) -> None:
    """Raises RecipeError."""
    if recipe.train.shard_base and processes == 1:
        raise RecipeError(
            "train.shard_base: one process has nobody to share with; launch several with accelerate, or set it to false"
        )


def load_to_share(recipe: Recipe, tokenizer: Any, is_main: bool) -> tuple[Any, BaseIdentity]:
    """The base model in the first process's memory, and without memory elsewhere; and what it is, everywhere.

    Raises RecipeError, ArtefactError on all processes if the first one cannot load it.
    """
    model: Any = None
    told: list[Any] = [None]
    if is_main:
        try:
            model = load_model(recipe.model, torch.device("cpu"))
            told = [(identify(recipe.model, model, tokenizer), packed_layers(model))]
        except (RecipeError, ArtefactError) as error:
            told = [error]
    broadcast_object_list(told)
    if isinstance(told[0], Exception):
        raise told[0]
    identity, packed = told[0]
    if model is None:
        model = skeleton(recipe.model).requires_grad_(False).eval()
        put_packed_layers(model, packed)
    return model, identity


def shard_base(model: nn.Module, adapter: Adapter, device: torch.device, processes: int, offload: bool = False) -> None:
    """Shard every decoder layer, then the rest (embeddings, norm, output layer); the adapter goes to `device` whole.

    `model` has its weights on the first process; what the others have of them is not looked at. `offload`: shards lie
    in host memory while their layer does not run. Raises RecipeError if the decoder layers cannot be told, or the
    processes' models are not alike.
    """
    layers = decoder_layers(model)
    if adapter.config.of_modules or adapter.config.residual:
        raise RecipeError(f"adapter.method: {adapter.config.method} was not tried with a base that is shared out")
    if not len(layers):
        raise RecipeError("train.shard_base: cannot tell this model's decoder layers")
    policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (processes,))
    sent: set[nn.Module] = set()
    for part in [*layers, model]:
        modules = [module for module in part.modules() if module not in sent]
        _send(modules, device)
        sent.update(modules)
        own = set(adapter.parameters().values())
        fully_shard(part, mesh=mesh, ignored_params=own, offload_policy=policy)
    move_states(model, device)


@dataclass(frozen=True)
class _Sent:
    """What the others must know of a tensor before it comes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    first: int  # where the same tensor stands first: tied weights are sent once


def _send(modules: list[nn.Module], device: torch.device) -> None:
    """The first process's own parameters and buffers of `modules`, onto every process's device. Raises RecipeError."""
    places = list(_places(modules))
    before = [getattr(module, name) for module, name in places]
    firsts: dict[int, int] = {}
    for i, tensor in enumerate(before):
        firsts.setdefault(id(tensor), i)
    mine = [_Sent(name, x.shape, x.dtype, firsts[id(x)]) for (_, name), x in zip(places, before, strict=True)]
    told = [mine]
    broadcast_object_list(told)
    if [one.name for one in told[0]] != [one.name for one in mine]:
        raise RecipeError("model.name_or_path: the processes' models differ; give every process the same files")
    after: list[Tensor] = []
    for (module, name), tensor, one in zip(places, before, told[0], strict=True):
        after.append(_received(tensor, one, device) if one.first == len(after) else after[one.first])
        setattr(module, name, after[-1])


def _places(modules: list[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield module, name


def _received(tensor: Tensor, sent: _Sent, device: torch.device) -> Tensor:
    """The first process's `tensor` on `device`, a parameter if it was one."""
    if dist.get_rank() == 0:
        plain = tensor.detach().as_subclass(Tensor).to(device).contiguous()  # bitsandbytes has a class of its own
    else:
        plain = torch.empty(sent.shape, dtype=sent.dtype, device=device)
    dist.broadcast(plain, src=0)
    return nn.Parameter(plain, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain
