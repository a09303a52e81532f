"""The step's gradients, added up over the processes while the last backward pass still runs.

A step has M backward passes for each micro-batch and a router gradient formed without one, which is not what DDP's
reducer counts. Adapters are small, so they stay replicated and are reduced once a step, in buckets: a bucket leaves as
soon as the step's last backward pass has been through its LoRAs, last layers first, and what is left (the routers'
part, a process without a micro-batch) when all passes are done. Losses are divided by the step's global target count,
so the sum is the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remix_cli.train.optim import allocate_gradients

BUCKET = 8 * 1024 * 1024  # numbers, 32 MiB of float32


@dataclass
class _Bucket:
    """Parameters whose gradients travel together."""

    parameters: list[nn.Parameter]
    missing: int = 0  # of their gradients, in the pass that is under way
    flat: Tensor | None = None  # on its way
    work: Any = None


class GradientSums:
    """One run's. All processes must call `finish` once a step; nothing happens where there is one process."""

    def __init__(
        self, early: list[nn.Parameter], late: list[nn.Parameter], processes: int, passes: int, size: int = BUCKET
    ):
        """`early`: parameters with gradients from backward passes alone, of which a micro-batch takes `passes`."""
        self.processes, self.passes = processes, passes
        self.armed = False  # is the step's last backward pass under way?
        self.left = 0  # backward passes
        self.next = 0  # bucket of `early` to leave
        self.early = _in_buckets(early[::-1], size)
        self.late = _in_buckets(late, size)
        if processes == 1:
            return
        self.group = dist.new_group()  # of its own: a sharded base gathers layers in between
        for bucket in self.early:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._seen_by(bucket))

    def begin(self, micro_batches: int) -> None:
        """A step begins, of so many on this process."""
        self.left, self.next = micro_batches * self.passes, 0
        for bucket in self.early:
            bucket.missing = len(bucket.parameters)

    def before_backward(self) -> None:
        """To be called before each backward pass; where it is not, all gradients leave at the end."""
        self.left -= 1
        self.armed = self.processes > 1 and self.left == 0

    def finish(self) -> None:
        """Replace every gradient by its sum over the processes; one that nothing has reached is 0."""
        self.armed = False
        buckets = self.early + self.late
        for bucket in buckets:
            allocate_gradients(bucket.parameters)
        if self.processes == 1:
            return
        for bucket in buckets[self.next :]:
            self._send(bucket)
        for bucket in buckets:
            bucket.work.wait()
            gradients = [parameter.grad for parameter in bucket.parameters]
            assert bucket.flat is not None
            parts = bucket.flat.split([parameter.numel() for parameter in bucket.parameters])
            for gradient, total in zip(gradients, parts, strict=True):
                assert gradient is not None
                gradient.copy_(total.view_as(gradient))
            bucket.flat = bucket.work = None

    def _seen_by(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def seen(_: Tensor) -> None:
            if not self.armed:
                return
            bucket.missing -= 1
            while self.next < len(self.early) and self.early[self.next].missing == 0:  # in one order everywhere
                self._send(self.early[self.next])
                self.next += 1

        return seen

    def _send(self, bucket: _Bucket) -> None:
        bucket.flat = torch.cat([p.grad.flatten() for p in bucket.parameters if p.grad is not None])
        bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)


def _in_buckets(parameters: list[nn.Parameter], size: int) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    room = 0
    for parameter in parameters:
        if room < parameter.numel():
            buckets.append(_Bucket([]))
            room = size
        buckets[-1].parameters.append(parameter)
        room -= parameter.numel()
    return buckets
