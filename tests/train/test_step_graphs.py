"""Recorded training steps: on the CPU with a stand-in for the recorder, on a GPU with CUDA graphs."""

from dataclasses import fields

import pytest
import torch
from helpers.common import close
from helpers.steps import build, rows
from helpers.tiny import tiny_model

from remix_cli.core.config import AdapterConfig
from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.patch import apply_adapter
from remix_cli.core.trace import Trace
from remix_cli.data.batches import collate
from remix_cli.models import batch_losses
from remix_cli.recipe.schema import Router
from remix_cli.train.micro_batch import accumulate_batch
from remix_cli.train.step_graphs import StepGraphs, _copy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Advantages are small differences of losses; on a GPU the routing kernel must take part, which knows no float64.
DTYPE, TOLERANCE = (torch.float32, 5e-3) if DEVICE.type == "cuda" else (torch.float64, 1e-9)


class ByHand:
    """What a graph does: the same run on the same tensors, its result left where the first one was.

    Recording computes nothing, so the gradients that this stand-in adds while it records are taken away again.
    """

    def __init__(self, adapter):
        self.adapter, self.replays = adapter, 0

    def __call__(self, run):
        before = [p.grad.clone() for p in self.adapter.parameters().values()]
        result = run()
        for p, gradient in zip(self.adapter.parameters().values(), before, strict=True):
            p.grad.copy_(gradient)

        def replay():
            self.replays += 1
            _fill(result, run())

        return result, replay


def _fill(into, new):
    for field in fields(into):
        a, b = getattr(into, field.name), getattr(new, field.name)
        a.copy_(b) if isinstance(a, torch.Tensor) else _fill(a, b)


def steps():
    """(rows, targets, step, beta): three shapes of batch, each more than once and with other numbers."""
    everything = rows(12)
    for step in range(9):
        part = [everything[(step + i) % 12] for i in range(2 + step % 3)]
        yield part, 50 + step, step, step / 10


@pytest.mark.parametrize("estimator", ["paper", "rtg", "control_variate", "straight_through"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_recorded_steps_have_the_gradients_of_plain_ones(estimator, level):
    check_recorded_steps(Router(estimator=estimator, selections=2), level=level)


def test_recorded_steps_balance_the_load_like_plain_ones():
    """What fills a batch up does not count as its share of the step."""
    check_recorded_steps(Router(balance=0.5), method="mixlora")


def check_recorded_steps(router, **config):

    def backward(loss):
        loss.backward()

    found = []
    for recorded in (False, True):
        model, adapter = build(dtype=DTYPE, **config)
        model.to(DEVICE).set_attn_implementation("sdpa")
        adapter.__dict__.pop("local", None)
        recorder = None if DEVICE.type == "cuda" else ByHand(adapter)
        estimator = make_estimator(router.estimator)
        graphs = StepGraphs(model, adapter, router, estimator, backward, recorder)
        results = []
        for part, targets, step, beta in steps():
            batch = collate(part)
            estimator.load_state_dict({"products": beta, "squares": 1.0})
            if recorded:
                result = graphs.accumulate(batch, targets, (3, step))
            else:
                options = {
                    "targets_in_step": targets,
                    "seed": (3, step),
                    "numbers": estimator.numbers(),
                    "backward": backward,
                }
                result = accumulate_batch(model, adapter, batch.to(DEVICE), router, estimator, **options)
            results.append(_copy(result))
            for name, p in adapter.parameters().items():
                results.append((name, p.grad.clone()))
                p.grad.zero_()
        found.append(results)
        assert not recorded or len(graphs.graphs) == 3
        assert not recorded or recorder is None or recorder.replays == 6
    for plain, replayed in zip(*found, strict=True):
        if isinstance(plain, tuple):
            assert plain[0] == replayed[0]
            assert close(replayed[1], plain[1], TOLERANCE), plain[0]
        else:
            assert close(replayed.loss, plain.loss, 1e-6)
            assert close(replayed.routing.sums, plain.routing.sums, 1e-5)
            assert torch.equal(replayed.routing.used, plain.routing.used)


def test_filling_up_a_batch_changes_no_loss():
    model = tiny_model()
    apply_adapter(model, AdapterConfig(pool_size=4, active=2, rank=2), seed=0)
    batch = collate(rows())
    wide = batch.in_few_shapes()
    assert wide.input_ids.shape[1] == 64
    assert len(wide.targets) == len(wide.positions.unique()) == 4 * 64  # no more targets than positions
    a, b = batch_losses(model, batch), batch_losses(model, wide)
    assert close(b[:, : a.shape[1]], a, 1e-6)
    assert b[:, a.shape[1] :].eq(0).all()


def test_a_pass_does_not_ask_whether_rows_are_packed(monkeypatch):
    """On a GPU the answer would be a wait for the device in every forward pass."""
    from transformers import masking_utils

    asked = []
    original = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(1) or original(ids))
    model, adapter = build()
    batch = collate(rows())
    with adapter.tracing(Trace(record=False)):
        losses = batch_losses(model, batch)
        assert not asked
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    assert asked  # the library does, left to itself
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch.positions], batch.targets, reduction="none")
    assert close(losses.flatten()[batch.positions], expected, 1e-5)
