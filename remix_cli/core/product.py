"""The product of a frozen linear layer and its pool of LoRAs.

    y = x W^T + bias + (g . (x A^T)) B^T       the gates g repeat each LoRA's weight r times

It is written three times. `pool_linear` has its backward pass by hand: autograd would give the same gradients through
about twice as many kernels, which is what a step of a small model or a few tokens is made of. By hand the sums are
folded into the products (`addmm`), the gradient with respect to W is never considered. `pool_linear_by_autograd` is
for what the first cannot see through: a quantised W, autocast, dropout on the pool's input. RemixLinear in
export/modeling_remix.py travels with exported models, which load without this package. tests/core/test_paths.py holds
them together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remix_cli.core.trace import RoutingState, Weighting


def pool_linear(
    x: Tensor,
    base: Any,
    lora_a: nn.Parameter,
    lora_b: nn.Parameter,
    weighting: Weighting,
    state: RoutingState,
) -> Tensor:
    """(B, T, D_out) from x (B, T, D_in), A (n r, D_in), or (r, D_in) if the pool shares it, B (D_out, n r)."""
    a, b = state.cast(lora_a, x.dtype), state.cast(lora_b, x.dtype)
    gates, weights = weighting
    if not torch.is_grad_enabled():
        return _product(x, base.weight, base.bias, a, b, gates)[0]
    return _PoolLinear.apply(x, base.weight, base.bias, lora_a, lora_b, a, b, weights, gates)


def pool_linear_by_autograd(
    x: Tensor, y: Tensor, lora_a: nn.Parameter, lora_b: nn.Parameter, weighting: Weighting
) -> Tensor:
    """y (B, T, D_out), what the linear itself gave, plus what the pool adds to it for x (B, T, D_in)."""
    gates, weights = weighting
    # Worked size: B, T = 4, 512, D_in = 4096, n = 8, r = 8.
    down = F.linear(x, lora_a.to(x.dtype))  # (4, 512, 64), or (4, 512, 8) of a shared A
    if down.shape[-1] != gates.shape[-1]:
        down = down.repeat(1, 1, gates.shape[-1] // down.shape[-1])
    if weights is None:
        mixed = down * gates.to(down.dtype)
    else:  # by LoRA, so that each weight gets its gradient
        by_lora = down.unflatten(-1, (weights.shape[-1], -1))  # (4, 512, 8, 8)
        mixed = (by_lora * weights.to(x.dtype).unsqueeze(-1)).flatten(-2)
    return y + F.linear(mixed, lora_b.to(x.dtype))  # (4, 512, D_out)


def gates_of(weights: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """(B, T or 1, n r) from weights (B, T or 1, n): each for the r columns of its LoRA."""
    return weights.detach().to(dtype).repeat_interleave(rank, -1)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D_out), and on the way to it x A^T and the same gated, both (B, T, n r)."""
    down = F.linear(x, a)
    if down.shape[-1] != gates.shape[-1]:  # a shared A
        down = down.repeat(1, 1, gates.shape[-1] // down.shape[-1])
    mixed = down * gates
    y = F.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(mixed.view(-1, mixed.shape[-1]), b.T)
    return y, down, mixed


class _PoolLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        a: Tensor,
        b: Tensor,
        weights: Tensor | None,
        gates: Tensor,
    ) -> Tensor:
        y, down, mixed = _product(x, weight, bias, a, b, gates)
        ctx.save_for_backward(x, weight, a, b, weights, gates, down, mixed)
        ctx.types = lora_a.dtype, lora_b.dtype
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, weights, gates, down, mixed = ctx.saved_tensors
        rows = g.flatten(0, -2)  # (S, D_out), S = B T
        d_mixed = F.linear(g, b.T)  # (B, T, n r)
        d_down = (d_mixed * gates).flatten(0, -2)
        if d_down.shape[-1] != a.shape[0]:  # a shared A gathers from all LoRAs
            d_down = d_down.unflatten(-1, (-1, a.shape[0])).sum(1)
        d_a = d_b = d_x = d_weights = None
        if ctx.needs_input_grad[4]:
            d_b = (rows.T @ mixed.flatten(0, -2)).to(ctx.types[1])
        if ctx.needs_input_grad[3]:
            d_a = (d_down.T @ x.flatten(0, -2)).to(ctx.types[0])
        if ctx.needs_input_grad[0]:
            d_x = (rows @ weight).addmm_(d_down, a).view(x.shape)
        if ctx.needs_input_grad[7]:
            by_lora = (d_mixed.to(weights.dtype) * down).unflatten(-1, (weights.shape[-1], -1))
            d_weights = by_lora.sum(-1).sum_to_size(weights.shape)
        return d_x, None, None, d_a, d_b, None, None, d_weights, None
