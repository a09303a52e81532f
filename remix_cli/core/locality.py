"""Which linear layers are read at their own position alone, so that a choice there answers for one loss only.

A choice at position s changes the losses at s and at all positions that read s: an attention, a convolution, a
recurrence that comes after carries it on. Where nothing of the kind comes after, the loss at s is the choice's whole
credit. Whether it does is no matter of names. Here the last layer's linears are watched in one small pass of the
model, whole and with its own weights, and the logits of some positions are differentiated: a linear is local if its
output at every other position has the derivative 0, exactly, and at some position's own another one.

Not from the skeleton of the model: attention and normalisation look alike there, only numbers tell what is read. Not
from a copy of the last layer: what the model does after its layers counts as well. The backward pass reaches down to
the last layer only. All of it takes about as long as one of the passes that a base model is checked by before training.

"Not local" is always valid: the estimate keeps its mean, and its variance is that of all later losses. So it is the
answer wherever this cannot look. What it cannot see is a layer that mixes positions at distances of POSITIONS or more
and at no smaller one, or by comparing positions without differentiable numbers (experts with room for so many tokens).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = 16


def local_linears(model: nn.Module, names: list[str]) -> set[str]:
    """Those of the linears `names` whose output at a position changes the logits of this position alone.

    `model` is run as it is, on token ids. None of them if it has no values (a skeleton), or cannot be run so or
    differentiated. Changes nothing.
    """
    try:
        return _probed(model, names)
    except Exception:  # of whatever code a model brings; and a skeleton has no numbers to look at
        return set()


def _probed(model: nn.Module, names: list[str]) -> set[str]:
    asked = (0, POSITIONS // 2, POSITIONS - 1)  # one row for each, so that one backward pass serves all
    device = next(model.parameters()).device
    ids = torch.arange(POSITIONS, device=device).remainder(2).expand(len(asked), -1)  # that any vocabulary has
    watched: dict[str, Tensor | None] = {}
    with ExitStack() as scope:
        scope.enter_context(_evaluating(model))
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(_watching(watched, name))
            scope.callback(handle.remove)
        scope.enter_context(torch.enable_grad())
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        of_asked = [logits[row, position].float().sum() for row, position in enumerate(asked)]
        followed = {name: zeros for name, zeros in watched.items() if zeros is not None}
        gradients = torch.autograd.grad(torch.stack(of_asked).sum(), list(followed.values()), allow_unused=True)
    return {name for name, gradient in zip(followed, gradients, strict=True) if _is_local(gradient, asked)}


def _watching(watched: dict[str, Tensor | None], name: str) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that adds zeros to a linear's output, whose gradient is the output's, and keeps them under `name`.

    None where one gradient does not tell: the linear runs twice, or gives something else than its product.
    """

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        if name in watched or not isinstance(output, Tensor):
            watched[name] = None
            return output
        zeros = torch.zeros_like(output, requires_grad=True)
        watched[name] = zeros
        return output + zeros

    return add


def _is_local(gradient: Tensor | None, asked: tuple[int, ...]) -> bool:
    """`gradient` (rows, positions, D_out) of the logits at the position that each row asks about."""
    if gradient is None or gradient.dim() != 3:
        return False
    read = (gradient != 0).any(-1)  # (rows, positions); what is no number counts as read
    own = torch.zeros_like(read)
    for row, position in enumerate(asked):
        own[row, position] = True
    return bool((read & own).any()) and not bool((read & ~own).any())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Context: no dropout. Each module gets its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
