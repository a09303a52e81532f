"""The `remix` command. Each verb parses, calls one function and prints what it returned.

Workers are imported inside the commands, so that `remix --help` needs neither torch nor half a second.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from remix_cli.errors import RecipeError, RemixError, is_out_of_memory

app = typer.Typer(
    name="remix",
    help="Finetune language models with routed mixtures of LoRAs (ReMix, arXiv 2603.10160).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe, for example configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, for example train.max_steps=20 seed=1."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder: the output_dir of `remix train`.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
Best = Annotated[bool, typer.Option("--best", help="Use the best adapter, not the last.")]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Use the adapter even if base model or tokenizer have changed.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use so many rows, spread evenly over all.")]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest valid checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run that output_dir holds.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as the recipe says.

    On several GPUs: accelerate launch -m remix_cli train RECIPE
    """
    console = Console(stderr=as_json)
    loaded = _recipe(recipe, overrides)
    from remix_cli.train.loop import train as run_training

    summary = run_training(loaded, console, resume=resume, overwrite=overwrite)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if as_json:
        print(json.dumps(summary))
        return
    best = summary["best_eval_loss"]
    console.print(
        f"done: {summary['steps']} steps in {summary['seconds']:.0f} s"
        + (f", best held-out loss {best:.4f} at step {summary['best_step']}" if best is not None else "")
        + f"; adapter in {loaded.output_dir}/adapter",
        highlight=False,
        soft_wrap=True,
    )


@app.command("eval")
def evaluate(
    run: RunPath,
    task: Annotated[
        list[str] | None,
        typer.Option(help="nll, gsm8k, arc, humaneval or reasoning_gym; by default the recipe's eval.tasks."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Score this file instead of the recipe's rows.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the unadapted base model the same way.")] = False,
    limit: Limit = None,
    shots: Annotated[
        int | None, typer.Option(min=0, max=64, help="Solved examples in front; needs --shots-from.")
    ] = None,
    shots_from: Annotated[str | None, typer.Option(help="File whose first rows are the solved examples.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="humaneval: answers per problem, for pass@k.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=5, help="Of the answers; 0 is greedy.")] = None,
    active: Annotated[
        str | None, typer.Option(metavar="K,K...", help="Activate so many LoRAs instead of the trained k.")
    ] = None,
    selection: Annotated[str, typer.Option(help="top, or sample as in training (the paper's ablation).")] = "top",
    allow_code: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs the model writes, confined (humaneval).")
    ] = False,
    best: Best = False,
    any_base: AnyBase = False,
    as_json: Json = False,
) -> None:
    """Score a run, or a model folder: held-out loss, GSM8K, ARC, HumanEval, reasoning-gym tasks.

    Every answer is kept in RUN/eval; an interrupted evaluation goes on where it was.
    """
    from dataclasses import replace

    from remix_cli.evaluate.request import requested_active, requested_tasks
    from remix_cli.evaluate.run import check_code
    from remix_cli.evaluate.run import evaluate as score
    from remix_cli.evaluate.tables import eval_stamp, eval_table
    from remix_cli.evaluate.tasks import Settings
    from remix_cli.runs import RunFolder, load_model_folder, load_run

    console = Console(stderr=as_json)
    if selection not in ("top", "sample"):
        raise RecipeError(f"--selection: {selection!r} is not known; use top or sample")
    folder = RunFolder(run)
    recipe = folder.load_recipe()  # whatever is wrong with the flags shows before the model loads
    if folder.is_model and not (task and (data or task == ["humaneval"])):
        raise RecipeError(f"{run}: a model, not a run: say what to score with --task and --data")
    base = base or folder.is_model
    settings = Settings(base=base, limit=limit, sampled=selection == "sample", allow_code=allow_code)
    changes = {"shots": shots, "samples": samples, "temperature": temperature}
    tasks = requested_tasks(recipe, task, data, changes, shots_from)
    config = recipe.adapter_config()
    if (settings.sampled or active) and not config.routed:
        raise RecipeError(f"--selection and --active are for routed adapters; this one is {config.method}")
    many = requested_active(active, config.pool_size)
    check_code(tasks, settings)
    loaded = load_model_folder(run) if folder.is_model else load_run(run, best=best, any_base=any_base)
    with _Bars() as bars:
        reports = [score(loaded, tasks, replace(settings, active=k), bars.start) for k in many]
    if as_json:
        print(json.dumps(reports[0] if len(reports) == 1 else {"reports": reports}))
        return
    for report in reports:
        console.print(eval_table(report))
        console.print(eval_stamp(report), highlight=False)
        console.print(f"written: {report['file']} and every answer beside it", highlight=False, soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Evaluated runs, or reports such as RUN/eval/base.json.")
    ],
    as_json: Json = False,
) -> None:
    """Compare evaluated runs on the same items: paired differences with 95 % intervals."""
    from remix_cli.evaluate.compare import compare as paired
    from remix_cli.evaluate.tables import comparison_tables

    found = paired(runs)
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    for table in comparison_tables(found):
        console.print(table)
        console.print()
    for line in found["skipped"]:
        console.print(f"skipped {line}", highlight=False)


@app.command("route-stats")
def route_stats(
    run: RunPath,
    data: Annotated[
        str | None, typer.Option(help="Rows in the recipe's first format; by default the held-out rows.")
    ] = None,
    limit: Limit = None,
    history: Annotated[bool, typer.Option("--history", help="Routing over the steps of training, no model.")] = False,
    compare_with: Annotated[
        Path | None, typer.Option("--compare", metavar="RUN", help="Beside another run, on this run's rows.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write figures, PNG and SVG.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every token's LoRAs, block by block, as JSON lines.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page: heat maps, history, tokens.")
    ] = None,
    fail_on_collapse: Annotated[
        bool, typer.Option("--fail-on-collapse", help="Exit 1 if a block's routing has collapsed.")
    ] = False,
    best: Best = False,
    any_base: AnyBase = False,
    as_json: Json = False,
) -> None:
    """Show how the routers choose: is it healthy, how decided, which LoRAs are used and for what."""
    from remix_cli.stats import view

    console = Console(stderr=as_json)
    if history:
        runs = [run] if compare_with is None else [run, compare_with]
        shown = view.history(runs, plot, console.width)
    else:
        with _Bars() as bars:
            request = view.Request(data, limit, compare_with, plot, trace, page, best, any_base)
            shown = view.routing(run, request, bars.start, console.width)
    if as_json:
        print(json.dumps(shown.document))
    for part in [] if as_json else shown.parts:
        console.print(part, highlight=False, soft_wrap=str(part).startswith("written:"))
    if fail_on_collapse and not shown.healthy:
        print(f"error: {shown.document['verdict']}", file=sys.stderr)
        raise typer.Exit(1)


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


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a recipe without training: keys, files, targets; show one row, parameters and memory."""
    loaded = _recipe(recipe, overrides)
    from remix_cli.train.preview import preview, print_preview

    found = preview(loaded)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print_preview(found, Console())


@app.command("verify-estimator")
def verify_estimator(as_json: Json = False) -> None:
    """Prove the router's gradient: exact bias by enumeration, variance relative to the paper's.

    Under two minutes on two cores. Exits 1 if an estimator that claims to be unbiased is not.
    """
    from dataclasses import asdict

    from remix_cli.verify.exact import exact_biases
    from remix_cli.verify.tables import bias_table, variance_table
    from remix_cli.verify.variance import variance_ratios

    console = Console(stderr=as_json)
    biases = exact_biases()
    ratios = variance_ratios()
    sound = all(bias.holds for bias in biases)
    if as_json:
        print(json.dumps({"sound": sound, "bias": [*map(asdict, biases)], "variance": [*map(asdict, ratios)]}))
    else:
        console.print(bias_table(biases))
        console.print()
        console.print(variance_table(ratios))
    if not sound:
        names = ", ".join(bias.arm for bias in biases if not bias.holds)
        print(f"error: not unbiased although it claims to be: {names}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from remix_cli.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def _recipe(path: Path, overrides: list[str] | None) -> Any:
    from remix_cli.recipe import load_recipe

    return load_recipe(path, overrides or [])


class _Bars:
    """Progress bars on stderr, so that stdout stays for results; silent where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "_Bars":
        if self.progress.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.progress.console.is_terminal:
            self.progress.stop()

    def start(self, name: str, total: int, done: int = 0) -> "_Bar":
        return _Bar(self.progress, self.progress.add_task(name, total=total, completed=done, speed=""))


class _Bar:
    """Items a second, and the running mean of a score if one is given."""

    def __init__(self, progress: Any, task: Any):
        self.progress, self.task = progress, task
        self.begun, self.count, self.sum = time.monotonic(), 0, 0.0

    def advance(self, n: int, value: float | None = None) -> None:
        self.count += n
        speed = f"{self.count / max(1e-9, time.monotonic() - self.begun):.1f}/s"
        if value is not None:
            self.sum += value
            speed += f"  mean {self.sum / self.count:.3f}"
        self.progress.update(self.task, advance=n, speed=speed)


def main() -> None:
    """Entry point: every expected failure is one `error:` line and its documented exit code."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(args=arguments, prog_name="remix")
    except RemixError as error:
        if debug:
            raise
        if int(os.environ.get("RANK", "0")) == 0:
            for line in error.problems:
                print(f"error: {_one_line(line)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if is_out_of_memory(error):
            fix = "lower train.per_device_train_batch_size, data.max_length or eval.batch_size"
            print(f"error: out of memory; {fix}, or set train.gradient_checkpointing", file=sys.stderr)
            sys.exit(2)
        what = _one_line(f"{type(error).__name__}: {error}")
        print(f"error: unexpected {what} (a bug: run again with --debug and report it)", file=sys.stderr)
        sys.exit(1)


def _one_line(text: str) -> str:
    """Without line breaks, and without the user name and password of any address."""
    return re.sub(r"(:/+)[^/@\s]+@", r"\1***@", " ".join(text.split()))


if __name__ == "__main__":
    main()
