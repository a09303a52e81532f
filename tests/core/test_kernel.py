"""The routing kernel against the eager router: interpreted on the CPU, and compiled where there is a GPU."""

import pytest
import torch
from helpers.common import close
from helpers.steps import gradients, same

from remix_cli.core import kernel, routing
from remix_cli.core.config import AdapterConfig
from remix_cli.core.product import gates_of
from remix_cli.core.router import Router
from remix_cli.core.trace import RoutingState
from remix_cli.recipe.schema import Router as RouterRecipe

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
SETTINGS = kernel.Settings(active=3, scale=0.5, rank=2, unit=True)
DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Let the interpreted kernel (see conftest.py) serve CPU tensors, too."""
    if not GPU:
        monkeypatch.setattr(kernel, "serves", lambda x, n: x.dtype != torch.float64 and n <= kernel.MAX_POOL)


def made(n, k, width, unit=True):
    config = AdapterConfig(pool_size=n, active=k, rank=3, router_unit_input=unit)
    router = Router("r", 0, width, config, RoutingState(), DEVICE)
    router.reset_parameters(torch.Generator().manual_seed(3))
    return router


@pytest.mark.parametrize(
    ("n", "k", "width", "shape", "unit", "dtype"),
    [
        (8, 4, 576, (2, 37), True, torch.bfloat16),
        (8, 4, 576, (2, 37), True, torch.float32),
        (5, 2, 100, (1, 3), False, torch.float32),  # neither n nor the width a power of two
        (1, 1, 7, (1, 1), True, torch.float32),
        (3, 3, 257, (3, 5), True, torch.float16),
        (64, 8, 130, (2, 9), True, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_kernel_chooses_as_the_eager_router(n, k, width, shape, unit, dtype, sampled):
    router = made(n, k, width, unit)
    generator = torch.Generator().manual_seed(0)
    x = (5 * torch.randn(*shape, width, generator=generator)).to(DEVICE, dtype)
    noise = routing.gumbel_noise(torch.arange(shape[0] * shape[1]).view(shape), 1, n)[0].to(DEVICE) if sampled else None
    settings = kernel.Settings(k, 0.5, 3, unit)  # 0.5 is a number in every type: the interpreter rounds down
    found = kernel.choose(x, router.weight.detach(), noise, settings, dtype, torch.float32)
    with torch.no_grad():
        logits, length = router.scores(x)
    assert close(found.logits, logits, 1e-5)
    assert close(found.length, length, 1e-6)
    assert torch.equal(found.chosen, routing.top_k(logits if noise is None else logits + noise, k))
    assert torch.equal(found.weights > 0, routing.selection_mask(found.chosen, n))
    assert torch.equal(found.weights.amax(-1), torch.full(shape, settings.scale, device=DEVICE))
    assert torch.equal(found.gates, gates_of(found.weights, settings.rank, dtype))
    assert torch.equal(found.gates, kernel.choose_gates(x, router.weight.detach(), noise, settings, dtype))


def test_equal_scores_go_to_the_lower_index():
    x = torch.ones(1, 2, 16, device=DEVICE)
    found = kernel.choose(x, torch.zeros(6, 16, device=DEVICE), None, SETTINGS, torch.float32, torch.float32)
    assert found.chosen.tolist() == [[[0, 1, 2], [0, 1, 2]]]


def test_scores_that_are_no_numbers_still_choose_valid_loras():
    x = torch.full((1, 2, 16), float("nan"), device=DEVICE)
    found = kernel.choose(x, torch.ones(6, 16, device=DEVICE), None, SETTINGS, torch.float32, torch.float32)
    assert found.chosen.tolist() == [[[0, 1, 2], [0, 1, 2]]]
    assert found.logits.isnan().all()


def test_inputs_that_are_slices_are_read_as_they_are():
    router = made(4, 2, 8)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)[..., :8]
    found = kernel.choose(x, router.weight.detach(), None, SETTINGS._replace(active=2), torch.float32, torch.float32)
    with torch.no_grad():
        assert close(found.logits, router.scores(x)[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["rtg", "control_variate"])
@pytest.mark.skipif(GPU, reason="the tiny model of test_step lives on the CPU")
def test_a_step_through_the_kernel_is_the_same_step(estimator, monkeypatch):
    recipe = RouterRecipe(estimator=estimator)
    calls, choose = [], kernel.choose
    monkeypatch.setattr(kernel, "choose", lambda *args: calls.append(1) or choose(*args))
    through = gradients(recipe)
    assert calls
    monkeypatch.setattr(kernel, "serves", lambda x, n: False)
    assert same(through, gradients(recipe))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_the_gradient_from_a_bfloat16_input_keeps_sixteen_bits():
    router = made(8, 4, 512)
    inputs = [torch.randn(4, 300, 512, device=DEVICE).bfloat16() for _ in range(3)]
    scaled = torch.randn(3, 4, 300, 8, device=DEVICE)
    router.add_gradient(inputs, scaled)
    exact = torch.einsum("mbtn,mbtd->nd", scaled.double(), torch.stack(inputs).double())
    assert close(router.weight.grad, exact, 2e-5)
