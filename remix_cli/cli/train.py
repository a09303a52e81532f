"""`remix train`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from remix_cli.cli.common import Json, Overrides, RecipePath
from remix_cli.cli.validate import show_preview
from remix_cli.errors import RecipeError
from remix_cli.launch import launch_rank
from remix_cli.streams import outlive
from remix_cli.terminal import Console


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest valid checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run that output_dir holds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, as `remix validate` does, and do nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as the recipe says.

    On several GPUs: accelerate launch -m remix_cli train RECIPE
    """
    console = Console(stderr=as_json)
    if resume and overwrite:
        raise RecipeError("--resume, --overwrite: one goes on with the run, the other replaces it; give one of them")
    from remix_cli.recipe import load_recipe
    from remix_cli.train.lines import say

    begun_in = _where_begun(recipe) if resume else None
    if begun_in is not None and not begun_in.samefile(Path.cwd()):
        if launch_rank() == 0:
            say(console, f"paths count from {begun_in}, where the run was begun")
        recipe = recipe.absolute()
        os.chdir(begun_in)
    loaded = load_recipe(recipe, overrides or [], stored=begun_in is not None)
    if dry_run:
        if launch_rank() == 0:
            show_preview(loaded, resume=resume, overwrite=overwrite, as_json=as_json)
        return
    from remix_cli.train.told_formats import tell_formats
    from remix_cli.train.trainer import train as run_training

    loaded, lines = tell_formats(loaded)
    if launch_rank() == 0:
        for line in lines:
            say(console, line)
    outlive(f"training goes on; its log is {loaded.output_dir}/metrics.jsonl")
    summary = run_training(loaded, console, resume=resume, overwrite=overwrite)
    if launch_rank() != 0:
        return
    if as_json:
        print(json.dumps(summary))
        return
    done = f"done: {summary['steps']} steps in {summary['seconds']:.0f} s"
    if summary["best_eval_loss"] is not None:
        metric = loaded.train.metric_for_best_model
        what = "best held-out loss" if metric == "eval_loss" else f"best by {metric}, with held-out loss"
        done += f", {what} {summary['best_eval_loss']:.4f} nats per token, at step {summary['best_step']}"
    say(console, f"{done}; adapter in {loaded.output_dir}/adapter")


def _where_begun(recipe: Path) -> Path | None:
    """The folder from which the paths of a run's own recipe count; None if this is no run's own."""
    from remix_cli.folders import RunFolder

    folder = RunFolder(recipe.parent)
    if recipe != folder.recipe or not recipe.is_file():
        return None
    return folder.begun_in()
