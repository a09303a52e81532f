"""Worker processes of a sweep, and what ends them."""

import heapq
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from remix_cli.errors import FailedRuns, Interrupted
from remix_cli.recipe import Recipe
from remix_cli.sweep.work import Ended, Failure, set_up, timed

Work = Callable[[Recipe], Failure | None]  # what went wrong
Then = Callable[[Ended], None]
LOOK = 2.0  # seconds between two looks at the runs in hand


class Pool:
    """Worker processes, each with a GPU in turn; what a job returns goes to its callback, in this process."""

    def __init__(self, processes: int):
        self.processes = processes
        context = multiprocessing.get_context("spawn")
        devices = context.Queue()
        for device in _devices(processes):
            devices.put(device)
        threads = max(1, (os.cpu_count() or 1) // processes)
        self.ended = context.Event()
        self.executor = ProcessPoolExecutor(processes, context, set_up, (devices, threads, self.ended))
        self.pending: dict[Future, Then] = {}  # that a worker has
        self.waiting: list[tuple[int, int, Work, Recipe, Then]] = []  # a heap: the order asked for, then first come
        self.came = itertools.count()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.stop()
        self.executor.shutdown(cancel_futures=True)

    def submit(self, job: Work, recipe: Recipe, then: Then, order: int = 0) -> None:
        """Jobs of a lower `order` are begun first."""
        heapq.heappush(self.waiting, (order, next(self.came), job, recipe, then))

    def _feed(self) -> None:
        """As many as there are workers: what is handed over has its turn for good."""
        while self.waiting and len(self.pending) < self.processes:
            _, _, job, recipe, then = heapq.heappop(self.waiting)
            self.pending[self.executor.submit(timed, job, recipe)] = then

    def until_idle(self, look: Callable[[], None]) -> None:
        """`look` is called every few seconds."""
        heeded = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        before = {s: signal.signal(s, _interrupt) for s in heeded}
        try:
            while self.pending or self.waiting:
                self._feed()
                look()
                for future in wait(self.pending, LOOK, FIRST_COMPLETED).done:
                    then = self.pending.pop(future)
                    try:
                        then(future.result())
                    except Interrupted as error:  # the signal went to the worker, too, which was quicker
                        raise Asked(error.signal_number) from None
                    except BrokenProcessPool:
                        line = "a worker process was killed, perhaps for want of memory; the same command goes on"
                        raise FailedRuns(2, line) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Ask the runs in hand to save and end; those that wait are not begun."""
        self.ended.set()
        for future in self.pending:
            future.cancel()
        for process in multiprocessing.active_children():
            process.terminate()


class Asked(KeyboardInterrupt):
    """Another signal than that of Ctrl-C, with the same consequences."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _interrupt(number: int, _: Any) -> None:
    raise Asked(number)


def _devices(processes: int) -> list[str | None]:
    """Which GPU each process gets, in turn; None where there is no choice."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name for name in visible.split(",") if name]
    else:
        import torch

        names = [str(i) for i in range(torch.cuda.device_count())]
    if len(names) < 2:
        return [None] * processes
    return [names[i % len(names)] for i in range(processes)]
