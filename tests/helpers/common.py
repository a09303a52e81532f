"""Where things lie, the one comparison of tensors, a Python process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
# What no command imports that only refuses or explains: a clock would say little on a busy machine.
HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "peft", "safetensors", "tokenizers", "sympy"}


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    """|a - b| <= relative * |b| in Euclidean norm. The only way tests compare floating-point tensors."""
    assert 0 < relative < 1e-2, "a tolerance that accepts anything is no tolerance"
    assert a.shape == b.shape
    return bool((a.double() - b.double()).norm() <= relative * b.double().norm())


def alone(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a Python process of its own, for what must not have been imported yet."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def written_again(kind: Any, path: Path) -> str:
    """The text of a stored document, read and written; what was written is read as the same."""
    found = kind.from_dict(json.loads(path.read_text()))
    assert kind.from_dict(found.to_dict()) == found
    return json.dumps(found.to_dict(), indent=2) + "\n"
