"""Commands that use the trained model: generate; export, which takes it elsewhere."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from remix_cli.cli.common import AnyBase, Best, RunPath, app
from remix_cli.errors import RecipeError
from remix_cli.streams import outlive
from remix_cli.terminal import Console


@app.command()
def export(
    run: RunPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="One of those above.")] = "hf",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the LoRA that merged formats fit; by default k r.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=8, help="Rows that merged formats fit on, and are priced on; by default 128.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Merged formats: exactly what is chosen for this prompt (routing by sequence).")
    ] = None,
    selection: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same for a selection.json of an earlier export.")
    ] = None,
    reference_base: Annotated[
        bool, typer.Option("--reference-base", help="hf: name the base model instead of copying its weights.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME/MODEL", help="Also upload the folder to the hub, privately.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: for everyone to read.")] = False,
    best: Best = False,
    any_base: AnyBase = False,
) -> None:
    """Take the trained model elsewhere.

    hf: the routed model as it is, for stock transformers (trust_remote_code). merged, peft-merged: ONE LoRA in place of
    the pool, in the weights or as a PEFT folder: an approximation, priced on held-out rows. peft-experts: every LoRA of
    the pool as a PEFT folder, and the router beside them. peft: what has no router (lora, rslora, dora ...).
    """
    from remix_cli.folders import check_run

    if form not in FORMATS:
        raise RecipeError(f"--format: {form!r} is not known; use {', '.join(FORMATS)}")
    one = prompt is not None or selection is not None
    if one and (form not in ("merged", "peft-merged") or (prompt is not None and selection is not None)):
        raise RecipeError("--prompt, --selection: give one of them, with --format merged or peft-merged")
    merges = form in ("merged", "peft-merged") and not one
    needs = {
        "--rank": (rank is not None and not merges, "--format merged or peft-merged, for all prompts"),
        "--rows": (rows is not None and not merges, "--format merged or peft-merged, for all prompts"),
        "--reference-base": (reference_base and form != "hf", "--format hf"),
        "--any-base": (any_base and form == "peft-experts", "a format that loads the base model"),
        "--public": (public and push_to_hub is None, "--push-to-hub"),
    }
    unread = next((f"{flag}: is for {what}; leave it out" for flag, (said, what) in needs.items() if said), None)
    if unread:
        raise RecipeError(unread)
    if output.exists() or output.is_symlink():
        raise RecipeError(f"--output: {output} exists; choose a new folder")
    folder = check_run(run, best=best)
    outlive(f"the export goes on, into {output}")
    client = None
    if push_to_hub is not None:
        from remix_cli.export.hub import check_push, push

        client = check_push(push_to_hub)
    for line in _export(folder, output, form, rank, rows, prompt, selection, reference_base, best, any_base):
        print(line)
    print(f"written: {output} (see its README.md for what it is and is not)")
    if push_to_hub is not None:
        print(f"uploaded: {push(client, output, push_to_hub, public)}")


FORMATS = ("hf", "merged", "peft-merged", "peft-experts", "peft")


def _export(
    folder: Any,
    output: Path,
    form: str,
    rank: int | None,
    rows: int | None,
    prompt: str | None,
    selection: Path | None,
    reference_base: bool,
    best: bool,
    any_base: bool,
) -> Iterator[str]:
    """Write the folder; lines to print."""
    from remix_cli.runs import load_run

    if form == "peft-experts":
        from remix_cli.export.peft_experts import export_peft_experts

        export_peft_experts(folder.best if best else folder.adapter, output)
        return
    loaded = load_run(folder.path, best=best, any_base=any_base)
    if form in ("hf", "peft"):
        from remix_cli.export.hf import export_hf
        from remix_cli.export.peft_folder import export_peft

        if form == "hf":
            found = str(export_hf(loaded, output, reference_base=reference_base))
        else:
            found = f"logits differ by {export_peft(loaded, output):.1e}"
        yield f"checked: the folder was loaded again; {found}"
        return
    from remix_cli.export.merged import export_merged, export_selection
    from remix_cli.export.selected import check_sequence_level, read_selection, selection_for

    if prompt is None and selection is None:
        cost = export_merged(loaded, output, into_weights=form == "merged", rank=rank, rows=rows or 128)
        yield from (f"{name:<45}{value:8.4f}" for name, value in cost.items())
        return
    check_sequence_level(loaded)
    chosen = read_selection(loaded, selection) if selection is not None else selection_for(loaded, prompt or "")
    export_selection(loaded, output, chosen, into_weights=form == "merged")
    yield "exact for this selection, which is in selection.json"


@app.command()
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
    from contextlib import nullcontext

    from remix_cli.folders import check_run

    folder = check_run(run, best=best)
    if block is not None and not show_routing:
        raise RecipeError("--block: says which router --show-routing shows; add that flag, or leave this one out")
    from remix_cli.evaluation.converse import answer, routed_tokens
    from remix_cli.evaluation.generate import Decoding
    from remix_cli.runs import load_run

    if show_routing and (base or not folder.load_recipe().adapter_config().routed):
        raise RecipeError("--show-routing: there is no router here")
    loaded = load_run(run, best=best, any_base=any_base)
    names = list(loaded.adapter.routers)
    if block is not None and block >= max(1, len(names)):
        raise RecipeError(f"--block: {block}: the run has routers 0 to {len(names) - 1}")
    decoding = Decoding(max_new_tokens, temperature, seed=seed)
    interactive = not prompts and sys.stdin.isatty()
    with loaded.adapter.disabled() if base else nullcontext():
        for prompt in prompts or _typed(interactive):
            if prompts and len(prompts) > 1:
                print(f"> {prompt}")
            ids, new = answer(loaded, prompt, decoding, lambda text: print(text, end="", flush=True))
            print()
            if show_routing:
                name = names[len(names) // 2 if block is None else block]
                print(f"\nLoRAs of {name}, for each token of the answer:")
                shown = (
                    f"{text!r}[{' '.join(map(str, chosen[name]))}]" for text, chosen in routed_tokens(loaded, ids, new)
                )
                Console().print(" ".join(shown), highlight=False)


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
