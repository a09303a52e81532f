"""Routing rules: how the logits of the chosen LoRAs become the weights of a pool.

An adapter's `pool` names one of RULES. Router, layer and trainer go by what a rule says of itself; nobody asks for its
name or for a method's. The Triton program of kernel_triton.py computes `ConstantWeight` and no other rule.
Letters: n LoRAs in a pool, k of them chosen; `...` is any leading shape, usually (B, T).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from remix_cli.core.config import AdapterConfig


@dataclass(frozen=True)
class Rule(ABC):
    """The rule of one router, for `active` chosen LoRAs (k), which at inference may be another k than in training."""

    config: AdapterConfig
    active: int

    # True: the weights are a function of the logits, so the loss's gradient reaches the router through them and the
    # router takes the top k. False: given the selection the weights are constants, so the router learns from drawn
    # selections, and what it reads is cut off from the graph.
    differentiable: ClassVar[bool]

    @abstractmethod
    def weights(self, logits: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights (..., n) of type `dtype` from logits (..., n) and chosen ids (..., k); 0 for what is not chosen."""


class ConstantWeight(Rule):
    """ReMix (arXiv 2603.10160): omega for each chosen LoRA, whatever its logit."""

    differentiable = False

    @cached_property
    def scale(self) -> float:
        """omega, at the total weight of training, omega times the k of training."""
        if self.active == self.config.active:
            return self.config.scale
        return self.config.scale * self.config.active / self.active

    def weights(self, logits: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(logits, dtype=dtype).scatter_(-1, chosen, self.scale)


class SoftmaxOverChosen(Rule):
    """MixLoRA (arXiv 2404.15159): the softmax over the chosen logits alone, times the total weight of training.

    With k = n it is HydraLoRA's dense softmax (arXiv 2404.19245).
    """

    differentiable = True

    @cached_property
    def total(self) -> float:
        return self.config.total_weight

    def weights(self, logits: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        share = logits.gather(-1, chosen).softmax(-1) * self.total  # (..., k)
        return torch.zeros_like(logits).scatter(-1, chosen, share).to(dtype)


RULES: dict[str, type[Rule]] = {"constant": ConstantWeight, "softmax": SoftmaxOverChosen}


def make_rule(config: AdapterConfig, active: int) -> Rule:
    """The rule that `config` names, for k = `active`. Raises ValueError for an adapter without a router."""
    if config.rule is None:
        raise ValueError(f"{config.method} has no router, and so no rule")
    return RULES[config.rule](config, active)
