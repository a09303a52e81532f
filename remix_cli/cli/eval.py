"""`remix eval`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remix_cli.cli.common import AllowCode, AnyBase, Bars, Best, Json, Limit, RunPath, TrustCode
from remix_cli.tasks.registry import TASKS
from remix_cli.terminal import Console

if TYPE_CHECKING:
    from remix_cli.evaluation.report import Evaluation


def evaluate(
    run: RunPath,
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(TASKS)}; by default the recipe's eval.tasks."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Score this file instead of the recipe's rows.")] = None,
    data_format: Annotated[
        str | None, typer.Option(help="Of --data, as in recipes: gsm8k, arc ...; by default as the recipe's rows.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the unadapted base model the same way.")] = False,
    limit: Limit = None,
    shots: Annotated[
        int | None, typer.Option(min=0, max=64, help="Solved examples in front; needs --shots-from or --lm-eval.")
    ] = None,
    shots_from: Annotated[str | None, typer.Option(help="File whose first rows are the solved examples.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="humaneval: answers per problem, for pass@k.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; else as the task says.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=5, help="Of the answers; 0 is greedy.")] = None,
    active: Annotated[
        str | None, typer.Option(metavar="K,K...", help="Activate so many LoRAs instead of the trained k.")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="top, or sample as in training (the paper's ablation); by default the recipe's.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASK,TASK...", help="Tasks of lm-evaluation-harness instead; --limit: the first rows."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Holds lm-eval tasks of your own, as YAML files.")
    ] = None,
    lm_eval_chat: Annotated[
        bool, typer.Option("--lm-eval-chat", help="Ask lm-eval's tasks through the chat template.")
    ] = False,
    allow_code: AllowCode = False,
    trust_code: TrustCode = False,
    best: Best = False,
    any_base: AnyBase = False,
    as_json: Json = False,
) -> None:
    """Score a run, a model folder or a PEFT folder: held-out loss, GSM8K, ARC, HumanEval, reasoning-gym tasks.

    Every answer is kept in RUN/eval; an interrupted evaluation goes on where it was.
    On several GPUs: accelerate launch -m remix_cli eval RUN
    """
    from remix_cli.folders import RunFolder, check_subject

    check_subject(run, best=best and RunFolder(run).is_run)
    from remix_cli.evaluation.score_folder import Flags, score_folder

    flags = Flags(
        task=task,
        data=data,
        data_format=data_format,
        base=base,
        limit=limit,
        shots=shots,
        shots_from=shots_from,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        active=active,
        selection=selection,
        allow_code=allow_code,
        trust_code=trust_code,
        best=best,
        any_base=any_base,
        lm_eval=lm_eval,
        lm_eval_path=lm_eval_path,
        lm_eval_chat=lm_eval_chat,
    )
    with Bars() as bars:
        evaluations = score_folder(run, flags, bars.start)
    console = Console(stderr=as_json)
    for evaluation in evaluations:
        _show(evaluation, console, notes_only=as_json)
    if as_json and evaluations:
        documents = [evaluation.to_dict() for evaluation in evaluations]
        print(json.dumps(documents[0] if len(documents) == 1 else {"reports": documents}))


def _show(evaluation: "Evaluation", console: Console, notes_only: bool) -> None:
    from remix_cli.evaluation.score_tables import eval_stamp, eval_table

    for line in evaluation.notes:
        console.print(line, highlight=False, soft_wrap=True)
    if notes_only:
        return
    console.print(eval_table(evaluation.report))
    console.print(eval_stamp(evaluation.report), highlight=False)
    console.print(f"written: {evaluation.file} and every answer beside it", highlight=False, soft_wrap=True)
