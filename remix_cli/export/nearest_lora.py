"""One LoRA in place of a routed pool: the fixed matrix that comes nearest to what the pool adds on calibration rows.

For a linear layer with input x the pool adds D(x) = omega sum_i z_i(x) B_i A_i x, z_i(x) = 1 where LoRA i is chosen.
The matrix M of least mean square |D(x) - M x|^2 is

    M = omega B C S^-1        C = E[(z . A x) x^T]  (n r, D_in)        S = E[x x^T]  (D_in, D_in)

and with S = L L^T the best of rank r' is the truncated singular value decomposition of M L, taken back by L^-1
(Eckart-Young in the norm that the inputs define: E|N x|^2 = |N L|^2). Where every LoRA is always on (k = n), C = A S
and M = omega B A, exactly. For LoRAs that are joined over layers (core/residual.py) what B is given stands in the place
of z . A x.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remix_cli.core.patch import Adapter
from remix_cli.core.residual import ResidualLinear
from remix_cli.core.trace import Trace
from remix_cli.data.batches import Batch
from remix_cli.errors import ArtefactError
from remix_cli.models import supervised_logits

RIDGE = 1e-4  # of the mean diagonal of S: directions that calibration never saw stay where the pool alone would be
ROWS_AT_ONCE = 256  # of supervised tokens, as float64 over the vocabulary
BUDGET = 4 << 30  # bytes of moments held at once; larger models take more passes over the rows


@dataclass
class Moments:
    """Sums over real tokens of one linear layer's calibration inputs, float64."""

    second: Tensor  # x x^T, (D_in, D_in)
    mixed: Tensor  # (z . A x) x^T, (n r, D_in)


@dataclass
class Merged:
    """A LoRA of one linear layer: y += up down x."""

    down: Tensor  # (r', D_in) float32
    up: Tensor  # (D_out, r') float32


def merge_pool(model: nn.Module, adapter: Adapter, batches: list[Batch], rank: int) -> dict[str, Merged]:
    """The nearest LoRA of rank `rank` for each adapted layer, by name, calibrated on every real token of `batches`."""
    merged: dict[str, Merged] = {}
    for names in _groups(adapter):
        for name, moments in calibrate(model, adapter, names, batches).items():
            linear = adapter.linears[name]
            merged[name] = merge(moments, linear.reading(), linear.outer(), adapter.config.scale, rank)
    return merged


def _groups(adapter: Adapter) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for name, linear in adapter.linears.items():
        size = 8 * linear.lora_A.shape[1] ** 2
        if groups[-1] and held + size > BUDGET:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


@torch.no_grad()
def calibrate(model: nn.Module, adapter: Adapter, names: list[str], batches: list[Batch]) -> dict[str, Moments]:
    """Moments of the layers `names` under top-k routing."""
    found: dict[str, Moments] = {}
    hooks: list[Any] = []
    real = torch.empty(0)  # (B T,) bool, of the batch in hand: where a real token stands
    trace = Trace()  # of the batch in hand

    handed: dict[nn.Module, Tensor] = {}  # to the B of linears that are joined over layers, (B, T, columns)

    def adding_to(moments: Moments) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def after(linear: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
            inputs = args[0]  # (B, T, D_in)
            x = inputs.flatten(0, -2)[real].float()
            moments.second += (x.T @ x).double()
            if isinstance(linear, ResidualLinear):
                given = handed.pop(linear.to_b).flatten(0, -2)[real].float()
            else:
                gates = trace.decisions[linear.router.name].gates.expand(*inputs.shape[:-1], -1)  # (B, T, n r)
                given = (gates != 0).flatten(0, -2)[real].float() * (x @ linear.lora_A.T)
            moments.mixed += (given.T @ x).double()

        return after

    for name in names:
        linear = adapter.linears[name]
        if isinstance(linear, ResidualLinear):
            hooks.append(linear.to_b.register_forward_hook(lambda to_b, _, given: handed.update({to_b: given})))
        wide = linear.reading().detach().double()
        found[name] = Moments(wide.new_zeros(wide.shape[1], wide.shape[1]), torch.zeros_like(wide))
        hooks.append(linear.register_forward_hook(adding_to(found[name])))
    try:
        for batch in batches:
            real = batch.mask.flatten()
            with adapter.tracing(Trace(prompt=batch.prompt)) as trace:
                model(input_ids=batch.input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def merge(moments: Moments, lora_a: Tensor, lora_b: Tensor, scale: float, rank: int) -> Merged:
    """The LoRA of rank `rank` nearest to the pool A (n r, D_in), B (D_out, n r) with omega = `scale`."""
    a, b, s = lora_a.detach().double(), lora_b.detach().double(), moments.second
    factor, ridge = _factor(s)
    down = torch.cholesky_solve((moments.mixed + ridge * _usage(moments, a) * a).T, factor).T  # C S^-1, (n r, D_in)
    basis, triangle = torch.linalg.qr(scale * b)  # so that the decomposition is of (n r, D_in), not (D_out, D_in)
    u, sigma, vt = torch.linalg.svd(triangle @ down @ factor, full_matrices=False)
    half = sigma[:rank].sqrt()
    back = torch.linalg.solve_triangular(factor, half[:, None] * vt[:rank], upper=False, left=False)
    return Merged(back.float(), (basis @ u[:, :rank] * half).float())


def _factor(s: Tensor) -> tuple[Tensor, Tensor]:
    """L, lower triangular, with L L^T = S + ridge; and the ridge, larger where rounding left S indefinite."""
    identity = torch.eye(len(s), dtype=s.dtype, device=s.device)
    smallest = RIDGE * s.diagonal().mean().clamp_min(1e-12)
    for ridge in smallest * torch.logspace(0, 3, 4).to(s):
        factor, failed = torch.linalg.cholesky_ex(s + ridge * identity)
        if not failed and torch.isfinite(factor).all():  # on a GPU NaN passes without a failure
            return factor, ridge
    raise ArtefactError("a layer's calibration inputs are not finite, or too alike for the rows given; raise --rows")


def _usage(moments: Moments, a: Tensor) -> Tensor:
    """(n r, 1): how much of each column's activation passes its LoRA's gate."""
    energy = ((a @ moments.second) * a).sum(-1, keepdim=True)
    return ((moments.mixed * a).sum(-1, keepdim=True) / energy.clamp_min(1e-30)).clamp(0, 1)


@contextmanager
def applied(adapter: Adapter, merged: dict[str, Merged]) -> Iterator[None]:
    """Inside, the model is the base model with the merged LoRAs."""

    def add(part: Merged) -> Any:
        def after(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = args[0]
            return y + F.linear(F.linear(x, part.down.to(x.dtype)), part.up.to(x.dtype))

        return after

    hooks = []
    for name, part in merged.items():
        hooks.append(adapter.linears[name].base_layer.register_forward_hook(add(part)))
    try:
        with adapter.disabled():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def price(
    model: nn.Module, adapter: Adapter, merged: dict[str, Merged], batches: list[Batch], whole: str = "routed"
) -> dict[str, float]:
    """Nats per supervised token: losses of the routed, the merged and the base model, and KL(routed || merged).

    `whole`: what the first is called, where it is not routed.
    """
    totals = dict.fromkeys(("routed", "merged", "base", "divergence"), 0.0)
    tokens = 0
    for batch in batches:
        with adapter.tracing(Trace(prompt=batch.prompt, record=False)):
            routed = supervised_logits(model, batch)
        with applied(adapter, merged):
            ours = supervised_logits(model, batch)
        with adapter.disabled():
            base = supervised_logits(model, batch)
        for start in range(0, len(batch.targets), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            for name, value in _sums(routed[rows], ours[rows], base[rows], batch.targets[rows]).items():
                totals[name] += value
        tokens += len(batch.targets)
    return {
        f"loss of the {whole} model": totals["routed"] / tokens,
        "loss of this approximation": totals["merged"] / tokens,
        "loss of the base model": totals["base"] / tokens,
        f"KL({whole}, approximation) in nats a token": totals["divergence"] / tokens,
    }


def _sums(routed: Tensor, ours: Tensor, base: Tensor, targets: Tensor) -> dict[str, float]:
    """From logits (S, V) and targets (S,): sums of losses and of KL(routed || ours).

    In float64: a divergence near 0 is the difference of terms that cancel, and float32 leaves 1e-8 of either sign.
    """
    log_p = {}
    sums = {}
    for name, logits in {"routed": routed, "merged": ours, "base": base}.items():
        log_p[name] = logits.double().log_softmax(-1)
        sums[name] = -float(log_p[name].gather(-1, targets[:, None]).sum())
    divergence = log_p["routed"].exp() * (log_p["routed"] - log_p["merged"])
    sums["divergence"] = float(divergence.sum())
    return sums
