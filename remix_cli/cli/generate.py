"""`remix generate`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remix_cli.cli.answers import router_named, show_routing, typed, write
from remix_cli.cli.common import (
    AnyBase,
    Bars,
    Best,
    MaxNewTokens,
    RunPath,
    Temperature,
    TopP,
    TrustCode,
    check_top_p,
)
from remix_cli.errors import RecipeError

if TYPE_CHECKING:
    from remix_cli.data.formats import Example
    from remix_cli.evaluation.generate import Decoding
    from remix_cli.runs import LoadedRun


def generate(
    run: RunPath,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Without any: read line by line.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="Prompts: txt, one a line, or rows in one of the data formats."),
    ] = None,
    as_lines: Annotated[
        bool, typer.Option("--jsonl", help="A JSON object a line: prompt and answer, in the order of the prompts.")
    ] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the answers, with a temperature.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="The base model's answers, for comparison.")] = False,
    show: Annotated[bool, typer.Option("--show-routing", help="The LoRAs behind every token of the answer.")] = False,
    block: Annotated[
        int | None, typer.Option(min=0, help="Which router --show-routing shows; by default the middle.")
    ] = None,
    best: Best = False,
    any_base: AnyBase = False,
    trust_code: TrustCode = False,
) -> None:
    """Try prompts on a run, a model folder or a PEFT folder; answers appear as they are written.

    Each is a turn of the user. Those of a --file are answered several at once, and printed in its order.
    """
    from remix_cli.folders import check_subject

    folder = check_subject(run, best=best)
    if block is not None and not show:
        raise RecipeError("--block: says which router --show-routing shows; add that flag, or leave this one out")
    if file is not None and (prompts or show):
        raise RecipeError(f"--file: leave out {'PROMPT' if prompts else '--show-routing'}, or the file")
    if show and as_lines:
        raise RecipeError("--show-routing: is for people; leave it out, or --jsonl")
    check_top_p(top_p, temperature)
    recipe = folder.load_recipe()
    if show and (base or not recipe.adapter_config().routed):
        raise RecipeError("--show-routing: there is no router here")
    given = None
    if file is not None:
        from remix_cli.data.prompts import prompts_in

        given = prompts_in(file, recipe.data.train[0])
    from remix_cli.evaluation.converse import answer
    from remix_cli.evaluation.generate import Decoding
    from remix_cli.runs import load_subject

    loaded = load_subject(run, best=best, any_base=any_base, trust_code=trust_code)
    router = router_named(loaded, block) if show else ""
    decoding = Decoding(max_new_tokens, temperature, seed=seed, top_p=top_p)
    if given is not None:
        _answer_all(loaded, given, decoding, base, as_lines)
        return
    for text in prompts or typed(sys.stdin.isatty()):
        if prompts and len(prompts) > 1 and not as_lines:
            print(f"> {text}")
        ids = loaded.encoder.question_ids(text)
        found = answer(loaded, ids, decoding, _nowhere if as_lines else write, base=base)
        _end(text, found.text, as_lines)
        if show:
            show_routing(loaded, found, router)


def _answer_all(run: "LoadedRun", given: "list[Example]", decoding: "Decoding", base: bool, as_lines: bool) -> None:
    from remix_cli.evaluation.converse import answers_to

    with Bars() as bars:
        bar = bars.start("answers", len(given))
        texts = answers_to(run, given, decoding, lambda: bar.advance(1), base=base)
    for example, text in zip(given, texts, strict=True):
        asked = [message["content"] for message in example.messages if message["role"] != "assistant"][-1]
        if not as_lines:
            print(f"> {asked}\n{text}", end="")
        _end(asked, text, as_lines)


def _end(prompt: str, text: str, as_lines: bool) -> None:
    print(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) if as_lines else "", flush=True)


def _nowhere(text: str) -> None:
    """For an answer that is printed when it is whole."""
