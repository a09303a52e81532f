"""The frozen base model shared out over the processes, by torch's FSDP2: each layer is gathered while it runs.

Adapters and routers stay whole on every process and keep their own type: they are a hundredth of the model, their
gradients are summed once a step (optim.sum_over_ranks), and checkpoints need no gathering. Every forward and backward
pass is now a collective, so all processes must make equally many: a process without a micro-batch of its own repeats
the step's first one at no weight, and one with fewer held-out rows repeats a row.
"""

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from remix_cli.core.patch import Adapter, decoder_layers
from remix_cli.errors import RecipeError
from remix_cli.recipe import Recipe


def check_launch(recipe: Recipe, processes: int) -> None:
    """Refuse launches that would shard in another way, or what cannot be sharded. Raises RecipeError."""
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise RecipeError(
                f"train.shard_base: accelerate was told to use {name}, which would shard adapters with the base; "
                "launch with configs/accelerate/multi-gpu.yaml and set train.shard_base: true to shard the base alone"
            )
    if recipe.train.shard_base and processes == 1:
        raise RecipeError("train.shard_base: one process has nobody to share with; launch several with accelerate")


def shard_base(model: nn.Module, adapter: Adapter, device: torch.device, processes: int) -> None:
    """Shard every decoder layer, then what is left (embeddings, norm, output layer). The adapter moves to `device`.

    Raises RecipeError if the decoder layers cannot be told.
    """
    layers = decoder_layers(model)
    if not len(layers):
        raise RecipeError("train.shard_base: cannot tell this model's decoder layers")
    own = list(adapter.parameters().values())
    for parameter in own:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (processes,))
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": set(own)}
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
