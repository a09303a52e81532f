"""Commands that take the trained model elsewhere: export."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remix_cli.cli.common import AnyBase, Best, RunPath, app
from remix_cli.errors import RecipeError


@app.command()
def export(
    run: RunPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    form: Annotated[str, typer.Option("--format", help="hf, merged, peft-merged or peft-experts, as above.")] = "hf",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the LoRA that merged formats fit; by default k r.")
    ] = None,
    rows: Annotated[int, typer.Option(min=8, help="Rows that merged formats fit on, and are priced on.")] = 128,
    reference_base: Annotated[
        bool, typer.Option("--reference-base", help="hf: name the base model instead of copying its weights.")
    ] = False,
    best: Best = False,
    any_base: AnyBase = False,
) -> None:
    """Take the trained model elsewhere.

    hf: the routed model as it is, for stock transformers (trust_remote_code). merged, peft-merged: ONE LoRA in place of
    the pool, in the weights or as a PEFT folder: an approximation, priced on held-out rows. peft-experts: every LoRA of
    the pool as a PEFT folder, and the router beside them.
    """
    from remix_cli.errors import ArtefactError
    from remix_cli.runs import RunFolder

    if form not in ("hf", "merged", "peft-merged", "peft-experts"):
        raise RecipeError(f"--format: {form!r} is not known; use hf, merged, peft-merged or peft-experts")
    if output.exists() or output.is_symlink():
        raise RecipeError(f"--output: {output} exists; choose a new folder")
    folder = RunFolder(run)
    if not folder.recipe.is_file():
        raise ArtefactError(f"{run}: not a run folder (no recipe.yaml); give the output_dir of a `remix train`")
    console = Console()
    if form == "peft-experts":
        from remix_cli.export.peft_experts import export_peft_experts

        export_peft_experts(folder.best if best else folder.adapter, output)
    else:
        from remix_cli.export.hf import export_hf
        from remix_cli.export.merged import export_merged
        from remix_cli.runs import load_run

        loaded = load_run(run, best=best, any_base=any_base)
        if form == "hf":
            difference = export_hf(loaded, output, reference_base=reference_base)
            console.print(f"checked: logits of the folder, loaded again, differ from ours by {difference:.1e}")
        else:
            cost = export_merged(loaded, output, into_weights=form == "merged", rank=rank, rows=rows)
            for name, value in cost.items():
                console.print(f"{name:<45}{value:8.4f}", highlight=False)
    console.print(f"written: {output} (see its README.md for what it is and is not)", highlight=False, soft_wrap=True)
