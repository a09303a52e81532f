"""Does the order of a LoRA's products matter? The one that is used, beside W + s B A added up first.

    python scripts/bench_orders.py [--repeats 15] [--tokens 512 2048]   CPU: float32; GPU: bfloat16, larger layers, too

RunLoRA (arXiv 2312.03415) chooses the order of products by counted operations. Forward and backward of one adapted
layer, x (T, D_in), W (D_out, D_in), A (r, D_in), B (D_out, r), can be

    used     x W' + s (x A') B'   the backward pass through A and B one by one   3 T r (D_in + D_out) for the LoRA
    merged   x (W + s B A)'       the same sum for the gradient of x       2 T r (D_in + D_out) + 2 r D_in D_out

and no other order has fewer unless r is near D. "counted" is the ratio of all multiplications, those with W among
them; "time" the median of paired repeats; "lost" how far each one's output is from float64's, as a share of what the
LoRA adds. A pool has its gates between A and B, which differ by token: only the first order is left to it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from remix_cli.core.product import pool_linear
from remix_cli.core.trace import RoutingState, Weighting

SMALL = {"SmolLM2 135M": (576, 1536)}
LARGE = {"1B": (2048, 8192), "8B": (4096, 14336)}
SCALE = 0.25


class Merged(torch.autograd.Function):
    """x (W + s B A)', nothing kept but x: the sum is made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        return x @ torch.addmm(weight, b.to(x.dtype), a.to(x.dtype), alpha=SCALE).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        thin_a, thin_b = a.to(x.dtype) * SCALE, b.to(x.dtype) * SCALE
        d_x = g @ torch.addmm(weight, b.to(x.dtype), thin_a)
        d_a = (g @ thin_b).T @ x
        d_b = g.T @ (x @ thin_a.T)
        return d_x, None, d_a.to(a.dtype), d_b.to(b.dtype)


def counted(tokens: int, width_in: int, width_out: int, rank: int) -> float:
    """Multiplications of `merged` as a share of those of the order that is used, forward and backward."""
    base = 2 * tokens * width_in * width_out
    thin = tokens * rank * (width_in + width_out)
    return (base + 2 * thin + 2 * rank * width_in * width_out) / (base + 3 * thin)


def both(width_in: int, width_out: int, rank: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The two orders as functions of x, and x, the frozen layer, A and B."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, size_of: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device) * size_of

    layer = nn.Linear(width_in, width_out, bias=False, device=device, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(normal(width_out, width_in, size_of=width_in**-0.5))
    a = nn.Parameter(normal(rank, width_in, size_of=width_in**-0.5))
    b = nn.Parameter(normal(width_out, rank, size_of=0.01))  # as training has it after some hundred steps
    x = normal(tokens, width_in).to(dtype).requires_grad_()
    state = RoutingState()
    weighting = Weighting(torch.full((1, 1, rank), SCALE, device=device, dtype=dtype), None)

    def used(x: Tensor) -> Tensor:
        return pool_linear(x.unsqueeze(0), layer, a, b, weighting, state).squeeze(0)

    def merged(x: Tensor) -> Tensor:
        return Merged.apply(x, layer.weight, a, b)

    return used, merged, x, layer, a, b


def timed(order: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    order(x).backward(gradient)
    wait()
    return time.perf_counter() - start


def lost(y: Tensor, exact: Tensor, added: Tensor) -> float:
    return float((y.double() - exact).norm() / added.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    args = parser.parse_args()
    repeats: int = args.repeats
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    table = Table(title=f"one layer, {dtype}, {device.type}: merged, of the order that is used", box=None)
    for column in ("layer", "tokens", "r", "counted", "time", "lost: used", "lost: merged"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, (width_in, width_out) in (SMALL | (LARGE if gpu else {})).items():
        for tokens in args.tokens:
            for rank in (8, 32, 64):
                used, merged, x, layer, a, b = both(width_in, width_out, rank, tokens, device, dtype)
                gradient = torch.randn(tokens, width_out, device=device).to(dtype)
                with torch.no_grad():
                    added = SCALE * (x.double() @ a.double().T) @ b.double().T
                    exact = x.double() @ layer.weight.double().T + added
                    losses = [lost(order(x), exact, added) for order in (used, merged)]
                ratios = [timed(merged, x, gradient) / timed(used, x, gradient) for _ in range(repeats)]
                share = f"{counted(tokens, width_in, width_out, rank):.2f}"
                figures = share, f"{statistics.median(ratios[2:]):.2f}", *(f"{value:.1e}" for value in losses)
                table.add_row(f"{name} {width_in} x {width_out}", str(tokens), str(rank), *figures)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
