"""A sweep's worker processes, replaced by this one."""

from pathlib import Path

from remix_cli.sweep import runner as sweep_run
from remix_cli.sweep import work


def in_this_process(monkeypatch):
    """Jobs run when they are submitted, and what they do is noted."""
    ran = []

    class Pool:
        def __init__(self, processes):
            self.processes, self.queue = processes, []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, job, recipe, then, order=0):
            self.queue.append((order, job, recipe, then))
            self.queue.sort(key=lambda entry: entry[0])  # stable: first come, first served

        def until_idle(self, look):
            while self.queue:
                look()
                _, job, recipe, then = self.queue.pop(0)
                ran.append((getattr(job, "func", job).__name__, Path(recipe.output_dir)))
                then(work.timed(job, recipe))

    monkeypatch.setattr(sweep_run, "Pool", Pool)
    return ran
