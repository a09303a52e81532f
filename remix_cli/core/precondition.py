"""Preconditioned gradients: those of a LoRA's A scaled by the inverse Gram matrix of its B, and the other way round.

A step that changes A by dA changes the linear layer by w B dA, w the LoRA's weight. Measured by that change and not by
dA itself, the steepest way down is along

    (w^2 B^T B)^-1 grad A     and     grad B (w^2 A A^T)^-1

(Riemannian preconditioned LoRA, arXiv 2402.02347; for mixtures of LoRAs arXiv 2502.15828). To first order such a step
changes w B A by -(P grad + grad Q), grad the gradient of the layer's own matrix, P and Q the projections on the columns
of B and the rows of A: whatever w is, and however one product B A is split into two factors. docs/methods.md has the
derivation, and what differs from the papers.

Gram matrices are damped: to M + delta I with delta = DAMPING times the mean of M's eigenvalues. So the damping is
relative, and a LoRA with A ten times larger and B ten times smaller still takes the same step; no direction is
stretched more than 1 / (2 sqrt(DAMPING)) = 50 times as much as an average one. Where B is 0, as at the start, there is
no mean to be relative to, and FLOOR keeps the inverse finite. The gradient of A is exactly 0 there, and stays so.

Nothing is kept from one step to the next. Letters: n LoRAs in a pool, r their rank, D the width of a factor, D_in for A
and D_out for B, which is held as B^T.
"""

import torch
from torch import Tensor

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import Adapter

DAMPING = 1e-4  # of the mean eigenvalue: float32 knows a Gram matrix to about 1e-6 of it
FLOOR = 1e-12  # in the units of A A^T, where entries of 1e-6 already make more


@torch.no_grad()
def precondition_gradients(adapter: Adapter, damping: float = DAMPING, *, unit: bool = False) -> None:
    """Scale the gradients of all LoRAs of `adapter`, in place; those of routers stay as they are.

    `unit`: each Gram matrix is first divided by the mean of its eigenvalues. Every factor's gradient comes out in the
    same direction, and about as long as it was: the scaling knows neither w nor the size of the other factor.

    For whole gradients: after the last micro-batch, without a loss scale. A few launches for each linear and no wait
    for the device. What is not finite, of a gradient or a LoRA, gives gradients that are not. Raises ValueError as
    `check_preconditioned` does.
    """
    config = adapter.config
    check_preconditioned(config)
    linears = list(adapter.linears.values())
    if not linears:
        return
    a = [_rows_by_lora(linear.lora_A, config.on_each) for linear in linears]  # (n, r, D_in) each
    b = [_columns_by_lora(linear.lora_B, config.on_each) for linear in linears]  # (n, r, D_out) each
    grams = torch.cat([factor @ factor.mT for factor in a + b])
    inverses = damped_inverses(grams, damping)
    inverses = inverses * _mean_eigenvalues(grams)[:, None, None] if unit else inverses / config.scale**2
    of_a, of_b = inverses.unflatten(0, (2, len(linears), -1))  # (linears, n, r, r) each
    for linear, inverse_a, inverse_b in zip(linears, of_a, of_b, strict=True):
        if linear.lora_A.grad is not None:
            gradient = _rows_by_lora(linear.lora_A.grad, config.on_each)
            gradient.copy_(inverse_b @ gradient)
        if linear.lora_B.grad is not None:
            gradient = _columns_by_lora(linear.lora_B.grad, config.on_each)
            gradient.copy_(inverse_a @ gradient)


def check_preconditioned(config: AdapterConfig) -> None:
    """Raises ValueError for pools that share one A, or join LoRAs over layers: which step of one matrix is steepest
    depends there on several others, and on the weights at each token."""
    if config.shares_a:
        raise ValueError(f"{config.method} has one A for the whole pool; preconditioned steps need one for each B")
    if config.residual:
        raise ValueError(f"{config.method} joins LoRAs over layers; preconditioned steps need LoRAs that stand alone")


def damped_inverses(grams: Tensor, damping: float) -> Tensor:
    """(P, r, r), the inverse of M + (`damping` tr M / r + FLOOR) I for each of P positive semidefinite M (P, r, r).

    By one factorisation M = L L^T for all of them, so each inverse is symmetric and positive to the last bit. L is not
    checked, which would be a wait for the device: with this damping it exists unless M is not finite.
    """
    one = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    damped = grams + (damping * _mean_eigenvalues(grams) + FLOOR)[:, None, None] * one
    lower = torch.linalg.cholesky_ex(damped).L
    inverse_lower = torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False)
    return inverse_lower.mT @ inverse_lower


def _mean_eigenvalues(grams: Tensor) -> Tensor:
    """(P,) from (P, r, r)."""
    return grams.diagonal(dim1=-2, dim2=-1).mean(-1)


def _rows_by_lora(stacked: Tensor, pool_size: int) -> Tensor:
    """A (n r, D_in), or its gradient, as (n, r, D_in); a view."""
    return stacked.unflatten(0, (pool_size, -1))


def _columns_by_lora(stacked: Tensor, pool_size: int) -> Tensor:
    """B (D_out, n r), or its gradient, as B^T (n, r, D_out); a view."""
    return stacked.T.unflatten(0, (pool_size, -1))
