"""What the commands share: the app, their arguments, progress bars."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

import remix_cli
from remix_cli.errors import RecipeError
from remix_cli.terminal import Console
from remix_cli.train.lines import shows_progress


def _print_version(asked: bool) -> None:
    if asked:
        print(f"remix {remix_cli.__version__}")
        raise typer.Exit


app = typer.Typer(
    name="remix",
    help="Finetune language models with routed mixtures of LoRAs (ReMix, arXiv 2603.10160).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and exit.")
    ] = (False),
) -> None:
    """What comes before a verb."""


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe, for example configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, for example train.max_steps=20 seed=1."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder: the output_dir of `remix train`.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
Best = Annotated[bool, typer.Option("--best", help="Use the best adapter, not the last.")]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Use the adapter even if base model or tokenizer have changed.")
]
TrustCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that a model folder brings along.")
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run programs the model writes, confined (humaneval).")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use so many rows, spread evenly over all.")]

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0, max=5, help="0 is greedy.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.01, max=1, help="Draw from the likeliest tokens with this probability.")
]


def check_top_p(top_p: float, temperature: float) -> None:
    """Raises RecipeError if nothing is drawn."""
    if top_p < 1 and not temperature:
        raise RecipeError("--top-p: says how answers are drawn, and at temperature 0 none is; give --temperature, too")


class Bars:
    """Progress bars on stderr, so that stdout stays for results; silent where there is no terminal and no notebook."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self.progress = Progress(*columns, console=console, transient=True)
        self.shown = shows_progress(console)

    def __enter__(self) -> "Bars":
        if self.shown:
            self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.shown:
            self.progress.stop()

    def start(self, name: str, total: int, done: int = 0) -> "Bar":
        return Bar(self.progress, self.progress.add_task(name, total=total, completed=done, speed=""))


class Bar:
    """Items a second, and the running mean of a score if one is given."""

    def __init__(self, progress: Any, task: Any):
        self.progress, self.task = progress, task
        self.begun, self.count, self.sum = time.monotonic(), 0, 0.0

    def advance(self, n: int, value: float | None = None) -> None:
        self.count += n
        speed = f"{self.count / max(1e-9, time.monotonic() - self.begun):.1f}/s"
        if value is not None:
            self.sum += value
            speed += f"  mean {self.sum / self.count:.3f}"
        self.progress.update(self.task, advance=n, speed=speed)
