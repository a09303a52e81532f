"""`remix generate`."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from remix_cli.cli.common import AnyBase, Best, RunPath
from remix_cli.errors import RecipeError
from remix_cli.terminal import Console

if TYPE_CHECKING:
    from remix_cli.runs import LoadedRun


def generate(
    run: RunPath,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Without any: read line by line.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=5, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the answers, with a temperature.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="The base model's answers, for comparison.")] = False,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="The LoRAs behind every token of the answer.")
    ] = False,
    block: Annotated[
        int | None, typer.Option(min=0, help="Which router --show-routing shows; by default the middle.")
    ] = None,
    best: Best = False,
    any_base: AnyBase = False,
) -> None:
    """Try prompts: each is a user's turn in the run's chat template; answers appear as they are written."""
    from remix_cli.folders import check_run

    folder = check_run(run, best=best)
    if block is not None and not show_routing:
        raise RecipeError("--block: says which router --show-routing shows; add that flag, or leave this one out")
    from remix_cli.evaluation.converse import answer
    from remix_cli.evaluation.generate import Decoding
    from remix_cli.runs import load_run

    if show_routing and (base or not folder.load_recipe().adapter_config().routed):
        raise RecipeError("--show-routing: there is no router here")
    loaded = load_run(run, best=best, any_base=any_base)
    routers = list(loaded.adapter.routers)
    if block is not None and block >= max(1, len(routers)):
        raise RecipeError(f"--block: {block}: the run has routers 0 to {len(routers) - 1}")
    decoding = Decoding(max_new_tokens, temperature, seed=seed)
    with loaded.adapter.disabled() if base else nullcontext():
        for prompt in prompts or _typed(sys.stdin.isatty()):
            if prompts and len(prompts) > 1:
                print(f"> {prompt}")
            ids, new = answer(loaded, prompt, decoding, _write)
            print()
            if show_routing:
                shown = len(routers) // 2 if block is None else block
                _show_routing(loaded, ids, new, routers[shown])


def _write(text: str) -> None:
    """A piece of an answer, as it comes."""
    print(text, end="", flush=True)


def _show_routing(run: "LoadedRun", ids: list[int], new: list[int], router: str) -> None:
    from remix_cli.evaluation.converse import routed_tokens

    print(f"\nLoRAs of {router}, for each token of the answer:")
    tokens = []
    for text, chosen in routed_tokens(run, ids, new):
        loras = " ".join(map(str, chosen[router]))
        tokens.append(f"{text!r}[{loras}]")
    Console().print(" ".join(tokens), highlight=False)


def _typed(interactive: bool) -> Iterator[str]:
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
    if not found and not interactive:
        raise RecipeError("standard input: closed or empty; give a prompt as an argument, or one a line")
