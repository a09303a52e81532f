"""`remix export` from start to end: write the folder in the format asked for, and upload it if asked."""

from collections.abc import Callable

from remix_cli.export.hf import export_hf
from remix_cli.export.holds import check_holds, check_peft_loads
from remix_cli.export.hub import check_push, push
from remix_cli.export.merged_formats import export_merged, export_one_lora, export_selection, is_one_lora
from remix_cli.export.peft_experts import export_peft_experts
from remix_cli.export.peft_folder import export_peft
from remix_cli.export.request import Request
from remix_cli.export.selected import check_sequence_level, read_selection, selection_for
from remix_cli.folders import RunFolder
from remix_cli.runs import LoadedRun, load_run

Say = Callable[[str], None]  # takes a line for the user

ROWS = 128  # that merged formats fit on, and are priced on, unless told otherwise


def export_run(folder: RunFolder, request: Request, say: Say) -> None:
    """Write `request.output` from a finished run; what was found on the way goes to `say` as it is known.

    Raises RecipeError, DataError, ArtefactError, StorageError: see the formats.
    """
    check_holds(request.form, folder.load_recipe().adapter.method)
    client = None
    if request.push_to_hub is not None:  # whatever would keep it from being uploaded shows before the work
        client = check_push(request.push_to_hub)
    if request.form == "peft-experts":  # the one that needs no base model
        export_peft_experts(folder.best if request.best else folder.adapter, request.output)
    else:
        _export(load_run(folder.path, best=request.best, any_base=request.any_base), request, say)
    say(f"written: {request.output} (see its README.md for what it is and is not)")
    if request.push_to_hub is not None:
        say(f"uploaded: {push(client, request.output, request.push_to_hub, request.public)}")


def _export(run: LoadedRun, request: Request, say: Say) -> None:
    check_peft_loads(request.form, run.stored)
    if request.form == "hf":
        agreement = export_hf(run, request.output, reference_base=request.reference_base)
        say(f"checked: the folder was loaded again; {agreement}")
        if run.stored.config.level == "sequence":
            say("engines such as vLLM and SGLang cannot run it (routing by sequence); for those: --format peft-merged")
            say("likelihoods by lm_eval would be another model's; use: remix eval RUN --lm-eval TASKS (see README.md)")
    elif request.form == "peft":
        difference = export_peft(run, request.output)
        say(f"checked: the folder was loaded again; logits differ by {difference:.1e}")
    elif request.form == "merged" and is_one_lora(run):
        request.refuse_fitting(run.stored.config.method)
        export_one_lora(run, request.output)
        say("exact: the LoRA is in the weights; the folder was loaded again and gives the run's logits")
    elif request.for_one_prompt:
        _export_for_one_prompt(run, request)
        say("exact for this selection, which is in selection.json")
    else:
        into_weights = request.form == "merged"
        rows = request.rows or ROWS
        cost = export_merged(run, request.output, into_weights=into_weights, rank=request.rank, rows=rows)
        for name, value in cost.items():
            say(f"{name:<45}{value:8.4f}")


def _export_for_one_prompt(run: LoadedRun, request: Request) -> None:
    check_sequence_level(run)
    if request.selection is not None:
        selection = read_selection(run, request.selection)
    else:
        selection = selection_for(run, request.prompt or "")
    export_selection(run, request.output, selection, into_weights=request.form == "merged")
