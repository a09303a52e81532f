"""Shared by all tests: tiny models built in code, one place for tolerances, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    """|a - b| <= relative * |b| in Euclidean norm. The only way tests compare floating-point tensors."""
    assert 0 < relative < 1e-2, "a tolerance that accepts anything is no tolerance"
    assert a.shape == b.shape
    return bool((a.double() - b.double()).norm() <= relative * b.double().norm())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    if not (DEMO_MODEL / "config.json").exists():
        pytest.fail("the demo model is missing: run `make model`")
    return DEMO_MODEL
