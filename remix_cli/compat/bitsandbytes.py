"""bitsandbytes on CPUs, and what it says there."""

import logging
from typing import Any


def keep_differentiable(model: Any) -> None:
    """Keep the 4-bit layers of `model` from packing their weights for inference on a CPU.

    On CPUs with AVX-512 bf16 any pass in evaluation mode packs them, for good, into a layout whose kernel has no
    backward pass (nn/modules.py, `Linear4bit.forward`): what trains afterwards has wrong gradients and no error. Seen
    with bitsandbytes 0.46 to 0.50.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def no_advice() -> None:
    """Silence two loggers, from now on.

    backends/cpu/ops.py advises in every process, on some CPUs, to install what would fetch native code;
    autograd/_functions.py says in every 8-bit layer of every pass that it rounds from other than 16-bit numbers.
    Seen with bitsandbytes 0.50.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
