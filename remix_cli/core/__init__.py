"""The library: a routed pool of LoRAs on a frozen model. Needs torch and safetensors only.

config.py       AdapterConfig: what is adapted and how it is routed
description.py  what an adapter folder says of itself, read without torch
routing.py      pure functions: draw k of n, log-probabilities, inclusion probabilities, entropy, ESS
quadrature.py   inclusion probabilities of large pools by numerical integration
router.py       Router: what it reads, its scores, its choice; which path serves when
rules.py        how logits become weights: constant ones, or a softmax
layer.py        RoutedLinear: a linear layer and its pool
residual.py     one LoRA that is joined to those of the layers before it
product.py      their product, by hand with its backward pass and by autograd
kernel.py       the router's choice in one GPU kernel, where it serves
kernel_triton.py  the kernel
clusters.py     which prompts belong together
locality.py     which linears are read at their own position alone
patch.py        find targets, apply and remove the adapter
step.py         the gradients of one micro-batch: M sampled passes, LoRA and router gradients
precondition.py  gradients of LoRAs scaled by the inverse Gram matrix of their other factor
step_routing.py  how the routers chose in one training step: sums that add up
trace.py        the one way in and out during a forward pass: set the mode, collect what was chosen
store.py        the adapter folder: remix_config.json and adapter.safetensors
lora_folder.py  one LoRA as a folder, PEFT's or ours; several of them as a pool
estimators/     of the router's gradient, one file each

The names below may be imported from here; a training loop of one's own is examples/own_training_loop.py.
"""

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remix_cli.core.config import AdapterConfig as AdapterConfig
    from remix_cli.core.estimators.registry import make_estimator as make_estimator
    from remix_cli.core.layer import RoutedLinear as RoutedLinear
    from remix_cli.core.patch import Adapter as Adapter
    from remix_cli.core.patch import apply_adapter as apply_adapter
    from remix_cli.core.precondition import precondition_gradients as precondition_gradients
    from remix_cli.core.router import Router as Router
    from remix_cli.core.step import BatchInputs as BatchInputs
    from remix_cli.core.step import accumulate_gradients as accumulate_gradients
    from remix_cli.core.step import plan_passes as plan_passes
    from remix_cli.core.store import load_stored as load_stored
    from remix_cli.core.store import save_adapter as save_adapter
    from remix_cli.core.trace import Decision as Decision
    from remix_cli.core.trace import Trace as Trace

# Found when they are asked for: recipes read config.py without torch.
_PUBLIC = {
    "AdapterConfig": "config",
    "RoutedLinear": "layer",
    "Router": "router",
    "Adapter": "patch",
    "apply_adapter": "patch",
    "make_estimator": "estimators.registry",
    "BatchInputs": "step",
    "accumulate_gradients": "step",
    "plan_passes": "step",
    "precondition_gradients": "precondition",
    "load_stored": "store",
    "save_adapter": "store",
    "Decision": "trace",
    "Trace": "trace",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(f"{__name__}.{_PUBLIC[name]}:{name}")
