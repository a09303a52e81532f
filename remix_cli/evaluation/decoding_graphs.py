"""Decoding by CUDA graph: the forward pass over one new token is recorded once and replayed for all others.

With one token a step the GPU waits for the host, which launches a thousand small kernels a pass; a replay is one
launch. It needs a cache of fixed size, so that every pass reads and writes the same memory.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from remix_cli.compat.transformers import forward_replaced, runs_as_one_graph

Run = Callable[[], Any]
Record = Callable[[Run], tuple[Any, Callable[[], None]]]  # -> what the run returns, and how to fill it again


def fixed_cache(model: Any, rows: int, length: int) -> StaticCache | None:
    """A cache for `rows` sequences of `length` tokens, or None where recording is of no use or not possible."""
    if model.device.type != "cuda" or not runs_as_one_graph(model):
        return None
    cache = StaticCache(config=model.config, max_cache_len=length, max_batch_size=rows)
    return cache if all(type(layer) is StaticLayer for layer in cache.layers) else None


@contextmanager
def graphed(model: Any, cache: Any, record: Record | None = None) -> Iterator[None]:
    """Inside, `model` replays its forward pass over one token per row, after the first such pass.

    For one call of `generate` with `cache` and nothing else that changes the model: what is recorded are the addresses
    of weights, cache and routing state.
    """
    with forward_replaced(model, _Replayed(model.forward, cache, record or _record_on_gpu)):
        yield


class _Replayed:
    """Stands in for a model's `forward`."""

    def __init__(self, forward: Callable[..., Any], cache: Any, record: Record):
        self.forward, self.cache, self.record = forward, cache, record
        self.inputs: dict[str, torch.Tensor] = {}
        self.output: Any = None
        self.replay: Callable[[], None] | None = None
        functools.update_wrapper(self, forward)  # `generate` reads the signature

    def __call__(self, **inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] != 1:
            return self.forward(**inputs)
        if self.replay is None:
            self._prepare(inputs)
        for name, tensor in self.inputs.items():
            tensor.copy_(inputs[name])
        assert self.replay is not None
        self.replay()
        return self.output

    def _prepare(self, inputs: dict[str, Any]) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        everything = inputs | self.inputs
        lengths = [layer.cumulative_length.clone() for layer in self.cache.layers]
        self.forward(**everything)  # a rehearsal, for what kernels set up when they first run
        for layer, length in zip(self.cache.layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)  # it wrote where the real pass will write, and does not count
        self.output, self.replay = self.record(lambda: self.forward(**everything))


def _record_on_gpu(run: Run) -> tuple[Any, Callable[[], None]]:
    """Recording runs nothing: the output holds the answer after the first replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return output, graph.replay
