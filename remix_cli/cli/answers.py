"""What `generate` and `chat` share: reading what is typed, and showing an answer and the LoRAs behind it."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from remix_cli.errors import RecipeError
from remix_cli.terminal import Console

if TYPE_CHECKING:
    from remix_cli.evaluation.converse import Answer
    from remix_cli.runs import LoadedRun

# Okabe and Ito's colours, told apart by colour-blind people; what a colour shows stands beside it in numbers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def write(text: str) -> None:
    """A piece of an answer, as it comes."""
    print(text, end="", flush=True)


def router_named(run: "LoadedRun", block: int | None) -> str:
    """The router of that number, or the middle one. Raises RecipeError if there is none."""
    routers = list(run.adapter.routers)
    if block is not None and block >= max(1, len(routers)):
        raise RecipeError(f"--block: {block}: the run has routers 0 to {len(routers) - 1}")
    return routers[len(routers) // 2 if block is None else block]


def show_routing(run: "LoadedRun", found: "Answer", router: str) -> None:
    """Each token of the answer with its LoRAs; tokens of the same ones have the same colour on a terminal."""
    from remix_cli.evaluation.converse import routed_tokens

    print(f"\nLoRAs of {router}, for each token of the answer:")
    colours: dict[str, str] = {}
    line = Text()
    for text, chosen in routed_tokens(run, found):
        loras = ",".join(map(str, chosen[router]))
        colour = colours.setdefault(loras, COLOURS[len(colours) % len(COLOURS)])
        line.append(f"{repr(text)[1:-1].replace(' ', '·')}[{loras}]", style=colour)  # no line breaks inside
        line.append(" ")
    Console().print(line)


def typed(interactive: bool) -> Iterator[str]:
    """Lines of stdin, asked for by a `> ` on a terminal. Raises RecipeError if there is none."""
    found = False
    while True:
        if interactive:
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"standard input: cannot be read ({error}); give prompts as lines of UTF-8") from None
        if line.strip():
            found = True
            yield line.strip()
        elif not line:
            break
    if interactive:
        print()
    if not found and not interactive:
        raise RecipeError("standard input: closed or empty; give a prompt as an argument, or one a line")
