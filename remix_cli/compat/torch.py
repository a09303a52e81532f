"""torch's meta device has shapes and no numbers."""

from contextlib import AbstractContextManager
from typing import Any


def zero_for_numbers() -> AbstractContextManager[Any]:
    """Context: code that asks a tensor without numbers for one (is anything infinite?) is told 0, which is no.

    Otherwise `Tensor.item()` raises RuntimeError on a meta tensor (torch/_meta_registrations.py,
    `meta_local_scalar_dense`), and no model whose own code looks at its numbers can be rehearsed on one. The mode that
    may answer instead lies in a module that torch names private. Seen with torch 2.13.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Zero(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default:
                return 0
            return function(*args, **(kwargs or {}))

    return Zero()
