"""Parameter groups, schedule and clipping."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from remix_cli.core.patch import Adapter
from remix_cli.recipe.schema import Recipe


def make_optimizer(adapter: Adapter, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with one group for the LoRAs and one, without weight decay, for the routers."""
    loras = list(adapter.lora_parameters().values()) if adapter.loras_learn else []
    routers = list(adapter.router_parameters().values())
    groups = [
        {"params": loras, "lr": recipe.train.learning_rate, "weight_decay": recipe.train.weight_decay},
        {"params": routers, "lr": recipe.router.learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True)


def make_schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """The factor on both groups' learning rates at each step, counted from 0: a function, so nothing to restore.

    The four curves are those of transformers.get_scheduler. Its module imports whatever is installed of peft,
    bitsandbytes and accelerate, and bitsandbytes asks the hub for kernels; so they are written out. One departure:
    the first step of a warm-up has the rate of its second there, because a step at rate 0 trains nothing.
    """
    kind = recipe.train.lr_scheduler_type
    warmup = math.ceil(recipe.train.warmup_ratio * steps)

    def factor(step: int) -> float:
        if kind == "constant":
            return 1.0
        if step < warmup:
            return (step + 1) / warmup
        if kind == "constant_with_warmup":
            return 1.0
        progress = (step - warmup) / max(1, steps - warmup)
        if kind == "linear":
            return max(0.0, 1.0 - progress)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    return factor


def allocate_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def clip(parameters: list[nn.Parameter], limit: float, device: torch.device) -> Tensor:
    """Scale the joint norm of these gradients down to `limit`; returns the norm before, not synchronised."""
    if not parameters:
        return torch.zeros((), device=device)
    return nn.utils.clip_grad_norm_(parameters, limit)
