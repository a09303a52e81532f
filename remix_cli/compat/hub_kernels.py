"""The package `kernels` of Hugging Face, which downloads native code."""

import sys


def fetch_no_code() -> None:
    """To every library of this process `kernels` is not installed, from now on.

    Where it is installed, bitsandbytes (backends/cpu/ops.py, on a CPU with AVX-512 bf16, when it is imported) and
    transformers (integrations/hub_kernels.py, GGUF files among others) use it to fetch native code from the hub and
    run it, without being asked. Seen with bitsandbytes 0.50 and transformers 5.24.
    """
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
