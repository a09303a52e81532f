"""`remix export`."""

from pathlib import Path
from typing import Annotated

import typer

from remix_cli.cli.common import AnyBase, Best, RunPath
from remix_cli.export.request import Request
from remix_cli.streams import outlive


def export(
    run: RunPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="One of those above; by default hf for a pool, else peft."),
    ] = None,
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
    the pool as a PEFT folder, and the router beside them. peft: one LoRA, or what PEFT computed. A run of one LoRA is
    merged exactly.
    """
    from remix_cli.export.holds import usual_form
    from remix_cli.folders import check_run

    folder = check_run(run, best=best)
    method = folder.load_recipe().adapter.method
    request = Request(
        output,
        form or usual_form(method),
        rank,
        rows,
        prompt,
        selection,
        reference_base,
        push_to_hub,
        public,
        best=best,
        any_base=any_base,
    )
    request.check()
    outlive(f"the export goes on, into {output}")
    from remix_cli.export.export_run import export_run

    export_run(folder, request, say=print)
