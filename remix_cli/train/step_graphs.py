"""Training steps by CUDA graph: the gradients of a micro-batch, recorded for each shape of batch and replayed.

A step launches thousands of kernels; with a small model, or a few tokens, the GPU waits for the host that does so. A
replay is one launch. What differs between two batches of one shape lies in tensors that keep their place: the batch,
the step's number (the draws are a function of it), its targets and the estimator's own numbers.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from remix_cli.core.estimators.base import Estimator
from remix_cli.core.patch import Adapter
from remix_cli.core.step import MicroResult
from remix_cli.data.batches import Batch
from remix_cli.recipe.schema import Router
from remix_cli.train.micro_batch import accumulate_batch
from remix_cli.train.optim import allocate_gradients

Run = Callable[[], MicroResult]
Replay = Callable[[], None]
Record = Callable[[Run], tuple[MicroResult, Replay]]  # -> where the result will stand after each replay


class StepGraphs:
    """`accumulate_batch` for one model, recorded when a shape comes for the second time.

    Gradients must keep their place, too: zero them, do not drop them.
    """

    drops_gradients = False

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        router: Router,
        estimator: Estimator,
        backward: Callable[[Tensor], None],
        record: Record | None = None,
    ):
        self.model, self.adapter, self.backward = model, adapter, backward
        self.router, self.estimator = router, estimator
        self.record = record or _Recorder()
        self.device = next(model.parameters()).device
        self.seen: set[tuple[int, ...]] = set()
        self.graphs: dict[tuple[int, ...], tuple[Batch, dict[str, Tensor], MicroResult, Replay]] = {}

    def accumulate(self, batch: Batch, targets_in_step: float, seed: tuple[int, int]) -> MicroResult:
        """Add the gradients of a batch that is still on the host; see `micro_batch.accumulate_batch`."""
        batch = batch.in_few_shapes().to(self.device)
        numbers = {
            "targets_in_step": torch.tensor(targets_in_step, dtype=torch.float64).to(self.device),
            "step": torch.tensor(seed[1]).to(self.device),
        }
        for name, value in self.estimator.numbers().items():
            numbers[name] = torch.tensor(value, dtype=torch.float64).to(self.device)
        shape = (*batch.input_ids.shape, len(batch.targets))
        if shape not in self.seen:
            self.seen.add(shape)
            allocate_gradients(list(self.adapter.parameters().values()))
            return self._run(batch, numbers, seed[0])
        if shape not in self.graphs:
            own = batch.with_tensors(torch.clone)
            kept = {name: x.clone() for name, x in numbers.items()}
            self.graphs[shape] = (own, kept, *self.record(lambda: self._run(own, kept, seed[0])))
        own, kept, result, replay = self.graphs[shape]
        new = batch.tensors() | numbers
        for name, tensor in (own.tensors() | kept).items():
            tensor.copy_(new[name])
        replay()
        return _copy(result)

    def _run(self, batch: Batch, numbers: dict[str, Tensor], seed: int) -> MicroResult:
        return accumulate_batch(
            self.model,
            self.adapter,
            batch,
            self.router,
            self.estimator,
            targets_in_step=numbers["targets_in_step"],
            seed=(seed, numbers["step"]),
            numbers=numbers,
            backward=self.backward,
        )


class _Recorder:
    """Records on the GPU. All graphs share their memory: a result is copied before the next replay."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> tuple[MicroResult, Replay]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = run()
        return result, graph.replay


def _copy(part: Any) -> Any:
    """A dataclass of tensors, and of such dataclasses, on memory of its own."""
    if isinstance(part, Tensor):
        return part.clone()
    return replace(part, **{field.name: _copy(getattr(part, field.name)) for field in fields(part)})
