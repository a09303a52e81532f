"""Preconditioned gradients: the published formula, what it is for, and its edges."""

import pytest
import torch
from helpers.common import close
from helpers.tiny import fill_adapter, tiny_model
from torch import Tensor

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import Adapter, apply_adapter
from remix_cli.core.precondition import DAMPING, FLOOR, damped_inverses, precondition_gradients

ONE = {"pool_size": 1, "active": 1}
POOLS = {
    "lora": ONE | {"omega": "lora"},
    "rslora": ONE,
    "remix": {"pool_size": 4, "active": 2},
    "mixlora": {"pool_size": 4, "active": 2},
}
RANK = 3
NONE = 1e-14  # as little damping as float64 bears


def adapter_of(method: str) -> Adapter:
    """With LoRAs of full rank, in float64."""
    model = tiny_model(dtype=torch.float64)
    adapter = apply_adapter(model, AdapterConfig(method=method, rank=RANK, **POOLS[method]), seed=0)
    fill_adapter(adapter)
    for linear in adapter.linears.values():
        linear.double()
    return adapter


def give_gradients(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters().values():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = drawn.to(parameter.dtype)


def inverse_of(gram: Tensor, damping: float) -> Tensor:
    """Of one damped matrix, by its eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    damped = values + damping * values.mean() + FLOOR
    return vectors @ torch.diag(1 / damped) @ vectors.T


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("method", list(POOLS))
def test_every_lora_is_scaled_by_the_gram_matrix_of_its_other_factor(method, unit):
    """As published, with omega B in the place of B: LoRA by LoRA, column by column of A and row by row of B."""
    adapter = adapter_of(method)
    give_gradients(adapter)
    before = {name: p.grad.clone() for name, p in adapter.parameters().items()}
    places = {name: p.grad.data_ptr() for name, p in adapter.parameters().items()}
    precondition_gradients(adapter, unit=unit)
    omega = adapter.config.scale
    for name, linear in adapter.linears.items():
        for i in range(adapter.config.pool_size):
            own = slice(RANK * i, RANK * (i + 1))
            a, b = linear.lora_A.detach()[own], linear.lora_B.detach()[:, own]
            for_a = inverse_of((omega * b).T @ (omega * b), DAMPING)
            for_b = inverse_of((omega * a) @ (omega * a).T, DAMPING)
            if unit:
                for_a = for_a * omega**2 * (b**2).sum() / RANK
                for_b = for_b * omega**2 * (a**2).sum() / RANK
            for column in range(a.shape[1]):
                expected = for_a @ before[f"{name}.lora_A"][own, column]
                assert close(linear.lora_A.grad[own, column], expected, 1e-9)
            for row in range(b.shape[0]):
                expected = before[f"{name}.lora_B"][row, own] @ for_b
                assert close(linear.lora_B.grad[row, own], expected, 1e-9)
    for name, parameter in adapter.router_parameters().items():
        assert torch.equal(parameter.grad, before[name])
    # a recorded step adds to gradients where they were when it was recorded
    assert places == {name: p.grad.data_ptr() for name, p in adapter.parameters().items()}


def changes(adapter: Adapter, slopes: dict[str, Tensor], damping: float = NONE) -> dict[str, Tensor]:
    """(D_out, D_in), by linear: the change of omega B A, to first order, by a preconditioned step of length 1 along the
    gradient of a loss whose slope with respect to each linear's matrix is as given."""
    omega, total = adapter.config.scale, torch.zeros((), dtype=torch.float64)
    for name, linear in adapter.linears.items():
        linear.lora_A.grad = linear.lora_B.grad = None
        total = total + (slopes[name] * (omega * linear.lora_B @ linear.lora_A)).sum()
    total.backward()
    precondition_gradients(adapter, damping)
    found = {}
    for name, linear in adapter.linears.items():
        by_a, by_b = linear.lora_B.detach() @ linear.lora_A.grad, linear.lora_B.grad @ linear.lora_A.detach()
        found[name] = -omega * (by_a + by_b)
    return found


def slopes_of(adapter: Adapter) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    found = {}
    for name, linear in adapter.linears.items():
        shape = linear.lora_B.shape[0], linear.lora_A.shape[1]
        found[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return found


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_product_moves_along_the_slope_projected_on_both_factors_whatever_omega(method):
    """The two differ in omega alone, and a second omega would be left over if it were not squared."""
    adapter = adapter_of(method)
    slopes = slopes_of(adapter)
    for name, change in changes(adapter, slopes).items():
        linear = adapter.linears[name]
        columns = torch.linalg.qr(linear.lora_B.detach()).Q
        rows = torch.linalg.qr(linear.lora_A.detach().T).Q
        expected = columns @ (columns.T @ slopes[name]) + (slopes[name] @ rows) @ rows.T
        assert close(change, -expected, 1e-6)


def split_otherwise(adapter: Adapter, mixing: Tensor) -> None:
    """A to S A and B to B S^-1, which leaves B A as it is."""
    with torch.no_grad():
        for linear in adapter.linears.values():
            linear.lora_A.copy_(mixing @ linear.lora_A)
            linear.lora_B.copy_(torch.linalg.solve(mixing, linear.lora_B, left=False))


@pytest.mark.parametrize(("mixed", "damping"), [("directions", NONE), ("lengths", DAMPING)])
def test_a_step_does_not_depend_on_how_the_product_is_split(mixed, damping):
    """With the damping of training it still does not depend on how long A is, and how short B."""
    adapter = adapter_of("rslora")
    slopes = slopes_of(adapter)
    before = changes(adapter, slopes, damping)
    mixing = 10 * torch.eye(RANK, dtype=torch.float64)
    if mixed == "directions":
        mixing = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, -1.0], [0.3, 0.0, 1.0]], dtype=torch.float64)
    split_otherwise(adapter, mixing)
    after = changes(adapter, slopes, damping)
    assert all(close(after[name], before[name], 1e-6) for name in before)


@pytest.mark.parametrize("unit", [False, True])
def test_where_b_is_zero_a_stays_and_b_moves(unit):
    """As every run begins, in float32; and a B that has hardly begun gives nothing that is not finite."""
    for start in (0.0, 1e-20, 1e-7):
        adapter = apply_adapter(tiny_model(), AdapterConfig(pool_size=4, active=2, rank=RANK), seed=0)
        for linear in adapter.linears.values():
            linear.lora_B.data.fill_(start)
        slopes = {name: slope.float() for name, slope in slopes_of(adapter).items()}
        omega = adapter.config.scale
        sum((slopes[n] * (omega * x.lora_B @ x.lora_A)).sum() for n, x in adapter.linears.items()).backward()
        precondition_gradients(adapter, unit=unit)
        for linear in adapter.linears.values():
            assert linear.lora_A.grad.isfinite().all()
            assert linear.lora_B.grad.isfinite().all()
            assert linear.lora_B.grad.norm() > 1
            assert start or not linear.lora_A.grad.any()


def test_the_damping_is_a_share_of_the_mean_eigenvalue():
    """So 1 over a direction that is not there is bounded, however large the others are."""
    values = torch.tensor([[4.0, 2.0, 0.0], [400.0, 200.0, 0.0]])
    found = damped_inverses(torch.diag_embed(values), 0.5)
    expected = torch.diag_embed(1 / (values + torch.tensor([[1.0], [100.0]])))
    assert close(found, expected, 1e-6)


def test_what_is_not_finite_is_not_hidden():
    """Training looks at the norm of what comes out, and stops."""
    for spoilt in ("lora_A", "lora_B"):
        adapter = adapter_of("remix")
        give_gradients(adapter)
        first = next(iter(adapter.linears.values()))
        getattr(first, spoilt).data[0, 0] = float("nan")
        precondition_gradients(adapter)
        assert not torch.stack([p.grad.norm() for p in adapter.lora_parameters().values()]).sum().isfinite()


def test_nothing_waits_for_the_device():
    """On torch's meta device no number can be asked for."""
    adapter = apply_adapter(tiny_model().to("meta"), AdapterConfig(pool_size=4, active=2, rank=RANK), seed=0)
    for parameter in adapter.parameters().values():
        parameter.grad = torch.empty_like(parameter)
    precondition_gradients(adapter)
    for parameter in adapter.lora_parameters().values():
        assert parameter.grad.is_meta
        assert parameter.grad._version == 1, "written once, with no number asked for on the way"


def test_one_a_for_all_is_refused():
    adapter = apply_adapter(tiny_model(), AdapterConfig(method="hydralora", pool_size=4, active=4, rank=2), seed=0)
    with pytest.raises(ValueError, match="hydralora has one A for the whole pool"):
        precondition_gradients(adapter)
