"""`remix verify-estimator`."""

import json
import sys
from typing import Annotated

import typer

from remix_cli.cli.common import Json
from remix_cli.terminal import Console


def verify_estimator(
    name: Annotated[str | None, typer.Argument(help="One of router.estimator, or one of your own; bias alone.")] = None,
    as_json: Json = False,
) -> None:
    """Prove the router's gradient: exact bias by enumeration, variance relative to the paper's.

    Two to four minutes on two cores. Exits 1 if an estimator that claims to be unbiased is not.
    """
    from dataclasses import asdict

    from remix_cli.verify.exact import exact_biases
    from remix_cli.verify.variance import variance_ratios
    from remix_cli.verify.verify_tables import bias_table, variance_table

    console = Console(stderr=as_json)
    biases = exact_biases(estimator=name)
    ratios = variance_ratios() if name is None else []
    sound = all(bias.holds for bias in biases)
    if as_json:
        print(json.dumps({"sound": sound, "bias": [*map(asdict, biases)], "variance": [*map(asdict, ratios)]}))
    else:
        console.print(bias_table(biases))
        if ratios:
            console.print()
            console.print(variance_table(ratios))
    if not sound:
        names = ", ".join(bias.arm for bias in biases if not bias.holds)
        print(f"error: not unbiased although it claims to be: {names}", file=sys.stderr)
        raise typer.Exit(1)
