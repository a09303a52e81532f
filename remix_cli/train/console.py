"""What a person sees: a live display on a terminal or in a notebook, plain lines in a log file. Only rank 0 prints."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from remix_cli.data.splits import TrainingData
from remix_cli.diagnostics.parameters import ParameterCounts
from remix_cli.evaluation.statistics import too_few
from remix_cli.recipe import Recipe
from remix_cli.train.lines import say, shows_progress
from remix_cli.train.micro_batch import describe_router

SILENCE = 15.0  # seconds after which one wants to hear how far it is


class TrainingConsole:
    """Context manager around a training run."""

    def __init__(self, console: Console, total: int, start: int, main: bool, shown: list[str]):
        """`shown`: the measures, besides the held-out loss, that a line gives after an evaluation."""
        self.shown = shown
        self.console, self.total, self.main = console, total, main
        self.step, self.begun, self.start = start, time.monotonic(), start
        self.live: Progress | None = None
        if main and shows_progress(console):
            self.live = Progress(
                TextColumn("training"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=console,
            )
            self.bar = self.live.add_task("training", total=total, completed=start, note="")

    def __enter__(self) -> "TrainingConsole":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def advance(self, step: int, loss: float) -> None:
        self.step = step
        if self.live:
            self.live.update(self.bar, completed=step, note=f"loss {loss:.4f}")

    def line(self, text: str) -> None:
        if self.main:
            say(self.console, text)

    def announce(self, recipe: Recipe, data: TrainingData, counts: ParameterCounts, step: int, total: int) -> None:
        """What is about to be trained, on what and how."""
        method = recipe.adapter.method
        also = f", {data.overlap} of them also in train" if data.overlap else ""
        lines = [
            f"train     {data.train.describe()}",
            f"held out  {data.validation.describe()}{also}",
            f"method    {method}: {recipe.method.summary}",
            f"adapter   {counts.describe()}",
        ]
        if recipe.adapter_config().samples:
            lines.append(f"router    {describe_router(recipe.router)}")
        if recipe.model.about_dtype:
            lines.append(f"dtype     {recipe.model.about_dtype}")
        few = too_few(len(data.validation.rows))
        if few:
            lines.append(f"warning   held-out rows: {few}")
        for line in [*lines, f"steps     {step} -> {total}, {data.plan.rows_per_step} rows each"]:
            self.line(line)

    def counting(self, what: str, total: int) -> Callable[[int], None]:
        """To be told of rows done of `total`; says how many there are, where it takes long."""
        begun = said = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal said, done
            done += count
            now = time.monotonic()
            if now - said >= SILENCE and done < total:
                said = now
                left = (now - begun) / done * (total - done)
                self.line(f"          {done:,} of {total:,} {what}, {_clock(left)} left")

        return advance

    def log(self, m: dict[str, Any]) -> None:
        """One line for a metrics record; fits 80 columns."""
        if "eval_loss" in m:
            best = " (best so far)" if m["best"] else ""
            self.line(f"step {m['step']:>5}  held-out loss {m['eval_loss']:.4f}{best}")
            scores = [f"{name} {m[name]:.3f}" for name in self.shown if name in m]
            if scores:
                self.line(f"            {', '.join(scores)}")
            return
        routing = f"H(q) {m['router_entropy']:.3f}  ESS {m['ess']:.2f}  " if "router_entropy" in m else ""
        left = (time.monotonic() - self.begun) / max(1, self.step - self.start) * (self.total - self.step)
        self.line(
            f"step {m['step']:>5}/{self.total}  loss {m['loss']:.4f}  {routing}"
            f"{m['tokens_per_second']:,.0f} tok/s  {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
