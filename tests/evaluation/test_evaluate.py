"""Scores: parsing, token weighting, and independence of batching and padding."""

from decimal import Decimal

import pytest
import torch
from helpers.tiny import fill_adapter, tiny_model

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.data.rows import EncodedRow
from remix_cli.evaluation.nll import mean_loss, row_losses
from remix_cli.tasks.gsm8k import flexible_answer, strict_answer


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("It is 4.\n#### 72", 72, 72),
        ("#### 1,234", 1234, 1234),
        ("#### $18.50 left", None, Decimal("18.5")),
        ("#### 18.50 left", Decimal("18.5"), Decimal("18.5")),
        ("#### -3", -3, -3),
        ("####7", None, 7),
        ("so 12 and then 15.", None, 15),
        ("no number", None, None),
        ("#### none, 5", None, 5),
        ("72.0", None, 72),
        ("#### 4\n#### 9", 4, 9),
    ],
)
def test_answers(text, strict, flexible):
    assert strict_answer(text) == strict
    assert flexible_answer(text) == flexible


def model_and_rows(**config):
    model = tiny_model()
    adapter = apply_adapter(model, AdapterConfig(pool_size=4, active=2, rank=2, **config), seed=0)
    fill_adapter(adapter)
    rows = []
    for length in (5, 13, 8, 21, 6):
        ids = torch.randint(2, 60, (length,))
        rows.append(EncodedRow(ids.numpy(), (torch.arange(length) >= 3).numpy(), "t"))
    return model, adapter, rows


def test_row_losses_do_not_depend_on_batch_size_and_match_transformers():
    model, adapter, rows = model_and_rows()
    together, alone = row_losses(model, adapter, rows, 5), row_losses(model, adapter, rows, 1)
    for row, a, b in zip(rows, together, alone, strict=True):
        ids = torch.from_numpy(row.input_ids).long().unsqueeze(0)
        labels = ids.masked_fill(~torch.from_numpy(row.supervised), -100)
        expected = model(ids, labels=labels).loss.item() * a.tokens
        assert a.tokens == b.tokens == int(row.supervised[1:].sum())
        assert a.nats == pytest.approx(expected, rel=1e-5)
        assert b.nats == pytest.approx(expected, rel=1e-5)
    weighted = sum(x.nats for x in alone) / sum(x.tokens for x in alone)
    assert mean_loss(together) == pytest.approx(weighted, rel=1e-5)


def test_evaluation_restores_training_mode():
    model, adapter, rows = model_and_rows()
    model.train()
    row_losses(model, adapter, rows, 2)
    assert model.training
