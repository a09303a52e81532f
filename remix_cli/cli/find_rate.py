"""`remix find-rate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remix_cli.cli.common import Json, Overrides, RecipePath
from remix_cli.terminal import Console

if TYPE_CHECKING:
    from remix_cli.train.rate_range import RateRange

SHOWN = 20  # lines of the curve


def find_rate(
    recipe: RecipePath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=20, help="Of the test; it ends sooner if the loss runs away.")] = 100,
    plot: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also draw the curve there (PNG and SVG).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Which learning rate? One short training whose rate grows until it fails; nothing is kept.

    The router's rate stays as the recipe has it.
    """
    from remix_cli.recipe import load_recipe

    console = Console(stderr=as_json)
    loaded = load_recipe(recipe, overrides or [])
    from remix_cli.train.rate_range import find_rate as measure

    console.print(f"{loaded.adapter.method}: at most {steps} steps, each at a higher rate", highlight=False)
    found = measure(loaded, steps, console)
    if plot is not None:
        from remix_cli.diagnostics.plots import plot_rates

        for path in plot_rates(found.rates, found.changes, found.smoothed, found.suggested, plot):
            console.print(f"written: {path}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    _print_curve(found, console)
    _print_advice(found, recipe, console)


def _print_curve(found: "RateRange", console: Console) -> None:
    """Every few steps: the rate, the smoothed change of the loss, and how far it has fallen as a bar."""
    step = max(1, -(-len(found.points) // SHOWN))
    deepest = max((-point.smoothed for point in found.points), default=0.0)
    console.print(f"\n{'rate':>9}  {'loss':>8}  nats a token, against the same rows before training", highlight=False)
    for point in found.points[step - 1 :: step]:
        bar = "#" * round(40 * max(0.0, -point.smoothed) / deepest) if deepest > 0 else ""
        console.print(f"{point.rate:>9.2g}  {point.smoothed:>+8.4f}  {bar}", highlight=False)


def _print_advice(found: "RateRange", recipe: Path, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    say("")
    if found.router_rate is not None:
        say(f"the router's rate was {found.router_rate:g} throughout (router.learning_rate)")
    if found.suggested is None:
        say("the loss never fell: more --steps, or look at the rows with `remix validate`")
        return
    say(f"steepest at {found.steepest:.2g}, lowest at {found.lowest:.2g}, of all steps; the lines show some of them")
    say(f"suggestion: train.learning_rate={found.suggested:g}, half way between")
    say(f"\nremix sweep {recipe} train.learning_rate={found.suggested:g}  # tries a third and three times as much, too")
