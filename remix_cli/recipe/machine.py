"""What this machine is good at, as far as a default depends on it. Standard library only, so that recipes load fast."""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Literal

GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's driver, AMD's, and either under Windows
FAST_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # Intel's and AMD's names, and Arm's


def usual_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16, and float32 where training would run on a CPU that has no instructions for it.

    Such a CPU rounds after each product: a feedforward layer of SmolLM2-135M takes 3.7 times as long on one with AVX2
    (512 rows, two cores). Where nothing can be told of the CPU, bfloat16.
    """
    slow = not has_gpu() and cpu_flags() and not cpu_flags() & FAST_BFLOAT16
    return "float32" if slow else "bfloat16"


def has_gpu() -> bool:
    """Is there one that training would use?"""
    told_not_to = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return not told_not_to and (sys.platform == "darwin" or any(map(os.path.exists, GPUS)))


@cache
def cpu_flags() -> frozenset[str]:
    """Names of the instruction sets of the first core; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").split())
