"""Our cross-entropy against torch's, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from helpers.common import close

from remix_cli import cross_entropy
from remix_cli.cross_entropy import token_losses


def case(dtype, rows=7, vocabulary=50):
    generator = torch.Generator().manual_seed(1)
    logits = (8 * torch.randn(rows, vocabulary, generator=generator)).to(dtype).requires_grad_()
    targets = logits.detach().argmax(-1)  # sure of most: where rounding before the subtraction would show
    targets[::2] = torch.randint(vocabulary, targets[::2].shape, generator=generator)
    return logits, targets, torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 120, 1 << 20])  # one row at a time, chunks with a short tail, all at once
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_are_those_of_torch(dtype, chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    logits, targets, g = case(dtype)
    found = token_losses(logits, targets)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    (ours,) = torch.autograd.grad(found, logits, g.to(found.dtype))
    wide = logits.detach().double().requires_grad_()
    wanted = F.cross_entropy(wide, targets, reduction="none")
    (exact,) = torch.autograd.grad(wanted, wide, g)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert close(found, wanted, max(1e-12, min(rounding, 1e-6)))
    assert ours.dtype == dtype
    assert close(ours, exact, rounding)
    sure = wide.detach().softmax(-1).gather(-1, targets[:, None]).squeeze(-1) > 0.99
    assert sure.any()
    at_target = ours.gather(-1, targets[:, None]).squeeze(-1)[sure].double()
    assert close(at_target, exact.gather(-1, targets[:, None]).squeeze(-1)[sure], 5e-3)


def test_nothing_supervised_is_no_loss():
    logits = torch.zeros(0, 5, requires_grad=True)
    found = token_losses(logits, torch.zeros(0, dtype=torch.long))
    found.sum().backward()
    assert found.shape == (0,)
    assert logits.grad.shape == (0, 5)
