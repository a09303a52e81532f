"""The base model's modules without memory for weights: names, counts, and a rehearsal of what a pass does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from remix_cli.compat.torch import zero_for_numbers
from remix_cli.compat.transformers import count_no_experts, one_sequence_a_row, quiet
from remix_cli.core.patch import is_linear, set_module
from remix_cli.models.loading import load_config, loading
from remix_cli.recipe.schema import Model


def skeleton(model: Model) -> Any:
    """The model's modules on torch's meta device. Raises RecipeError if there is no such model."""
    config = load_config(model)
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.attn_implementation != "flash_attention_2":  # which cannot run here, and need not be installed
        options["attn_implementation"] = model.attn_implementation
    with torch.device("meta"), quiet():
        made = loading(model, lambda: AutoModelForCausalLM.from_config(config, **options))
    return made.to("meta")  # some code makes weights by constructors that no device context reaches


@contextmanager
def rehearsing(model: Any, training: bool = True) -> Iterator[None]:
    """Context: a skeleton runs as it would in training, or in an evaluation."""
    count_no_experts(model)
    model.train(training)
    try:
        with one_sequence_a_row(), quiet(), zero_for_numbers():
            yield
    finally:
        model.eval()


def meta_ids() -> Tensor:
    """Two rows for a skeleton."""
    return torch.zeros(2, 8, dtype=torch.long, device="meta")


@torch.no_grad()
def input_ranks(model: Any) -> dict[str, int]:
    """Of a skeleton: how many dimensions the input of each linear layer has in a training pass over two rows, by name.

    3 where rows, positions and width come apart; 2 where tokens come as one list, as those of shared experts do; 0
    where the layer is not called, or its weight is read past it. Missing is what comes after an operation that needs
    more than one number, which a skeleton has none of.
    """
    found: dict[str, int] = {}
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    for name, module in linears.items():
        set_module(model, name, _Probe(module, name, found))
    try:
        with rehearsing(model):
            model(input_ids=meta_ids(), use_cache=False)
    except Exception:  # of whatever code a model brings: the rest shows in the first pass of training
        return found
    finally:
        for name, module in linears.items():
            set_module(model, name, module)
    return dict.fromkeys(linears, 0) | found


class _Probe(nn.Module):
    """Stands in a linear layer's place, as an adapted one would, and notes how it is used."""

    def __init__(self, base: nn.Module, name: str, ranks: dict[str, int]):
        super().__init__()
        self.base = base
        self.name = name
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        self.ranks.setdefault(self.name, x.dim())
        return self.base(x)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            self.ranks[self.name] = 0
        if name == "base":  # a module, which nn.Module keeps apart from other attributes
            return super().__getattr__(name)
        return getattr(self.base, name)
