"""`remix eval`: from a folder and the verb's flags to scores."""

from dataclasses import dataclass, replace
from pathlib import Path

from remix_cli.errors import RecipeError
from remix_cli.evaluation.crew import Crew
from remix_cli.evaluation.evaluator import Progress, assist, check_code, evaluate
from remix_cli.evaluation.report import Evaluation
from remix_cli.evaluation.request import (
    all_bring_rows,
    refuse_flags_of_an_adapter,
    requested_active,
    requested_tasks,
)
from remix_cli.folders import RunFolder
from remix_cli.recipe import Recipe
from remix_cli.runs import load_subject
from remix_cli.tasks.base import Settings


@dataclass(frozen=True)
class Flags:
    """Of the verb; None or False where one was not given."""

    task: list[str] | None = None
    data: str | None = None
    data_format: str | None = None
    base: bool = False
    limit: int | None = None
    shots: int | None = None
    shots_from: str | None = None
    samples: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    active: str | None = None  # `1,2,4`
    selection: str | None = None  # `top` or `sample`
    allow_code: bool = False
    trust_code: bool = False
    best: bool = False
    any_base: bool = False
    lm_eval: str | None = None  # `arc_easy,hellaswag`
    lm_eval_path: Path | None = None
    lm_eval_chat: bool = False


def score_folder(path: Path, flags: Flags, progress: Progress) -> list[Evaluation]:
    """Score the run, or the model folder, at `path`: once for each number of active LoRAs that is asked for.

    Of several processes of one launch the first returns the results, and the others, which answer their share, none.
    Whatever is wrong with the flags shows before the model loads. Raises RecipeError, and as `evaluate` does.
    """
    folder = RunFolder(path)
    if flags.selection not in (None, "top", "sample"):
        raise RecipeError(f"--selection: {flags.selection!r} is not known; use top or sample")
    recipe = folder.load_recipe()
    _check_subject(folder, flags)
    if flags.lm_eval is not None:
        return _by_harness(path, recipe, flags, progress)
    _refuse(HARNESS_ONLY, flags, "goes with --lm-eval; leave it out")
    sampled = (flags.selection or recipe.eval.selection) == "sample"
    settings = Settings(
        base=flags.base or folder.is_model, limit=flags.limit, sampled=sampled, allow_code=flags.allow_code
    )
    changes = {
        "shots": flags.shots,
        "samples": flags.samples,
        "temperature": flags.temperature,
        "max_new_tokens": flags.max_new_tokens,
    }
    tasks = requested_tasks(recipe, flags.task, flags.data, changes, flags.shots_from, flags.data_format)
    many = requested_active(flags.active, recipe.adapter_config(), sampled)
    check_code(tasks, settings)
    loaded = load_subject(path, best=flags.best, any_base=flags.any_base, trust_code=flags.trust_code)
    crew = Crew()
    found = []
    for active in many:
        asked = replace(settings, active=active)
        if crew.is_main:
            found.append(evaluate(loaded, tasks, asked, progress, crew))
        else:
            assist(loaded, tasks, asked, crew)
    return found


OURS_ONLY = (
    "task",
    "data",
    "data_format",
    "shots_from",
    "samples",
    "max_new_tokens",
    "temperature",
    "selection",
    "allow_code",
)
HARNESS_ONLY = ("lm_eval_path", "lm_eval_chat")
FLAG_OF = {"allow_code": "--allow-code-execution"}  # the others are called as their fields


def _refuse(names: tuple[str, ...], flags: Flags, why: str) -> None:
    """Raises RecipeError if one of these flags is given; 0 is a temperature."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value is not False:
            raise RecipeError(f"{FLAG_OF.get(name, '--' + name.replace('_', '-'))}: {why}")


def _by_harness(path: Path, recipe: Recipe, flags: Flags, progress: Progress) -> list[Evaluation]:
    """As `score_folder`, for tasks of lm-evaluation-harness."""
    from remix_cli.evaluation.harness import Asked, evaluate_by_harness, load_tasks

    assert flags.lm_eval is not None
    _refuse(OURS_ONLY, flags, "is of our own tasks, and lm-eval's say this themselves; leave it out with --lm-eval")
    settings = Settings(base=flags.base or RunFolder(path).is_model)
    many = requested_active(flags.active, recipe.adapter_config(), False)
    found = []
    asked = Asked(load_tasks(flags.lm_eval, flags.lm_eval_path), flags.shots, flags.lm_eval_chat)
    loaded = load_subject(path, best=flags.best, any_base=flags.any_base, trust_code=flags.trust_code)
    if flags.lm_eval_chat and not loaded.tokenizer.chat_template:
        raise RecipeError(f"--lm-eval-chat: the tokenizer of {path} has no chat template; leave it out")
    for active in many:
        found.append(evaluate_by_harness(loaded, asked, replace(settings, active=active), progress, flags.limit))
    return found


def _check_subject(folder: RunFolder, flags: Flags) -> None:
    """Raises RecipeError for flags that do not go with what is scored: a run, its base alone, another folder."""
    says_what = flags.lm_eval or (flags.task and (flags.data or all_bring_rows(flags.task)))
    if not folder.is_run and not says_what:
        what = "a model" if folder.is_model else "a PEFT adapter"
        raise RecipeError(f"{folder.path}: {what}, not a run: say what to score with --task and --data, or --lm-eval")
    of_adapter: dict[str, object] = {
        "--active": flags.active,
        "--selection sample": flags.selection == "sample",
        "--best": flags.best,
    }
    if flags.base:
        refuse_flags_of_an_adapter(of_adapter, "--base takes it away; leave one of them out")
    if not folder.is_run:
        of_adapter["--any-base"] = flags.any_base
        none = "a model folder has none" if folder.is_model else "this one is PEFT's, and has no choice of LoRAs"
        refuse_flags_of_an_adapter(of_adapter, f"{none}; leave it out")
    if flags.trust_code and not folder.is_model:
        raise RecipeError(
            "--trust-remote-code: is for a model folder; whether a run's base model may run its code is "
            f"model.trust_remote_code in {folder.recipe}"
        )
