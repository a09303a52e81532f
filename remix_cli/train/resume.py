"""Whether a run may go on from what another process left, or train beside others: the same recipe, rows, models."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import gather_object

from remix_cli.core.store import BaseIdentity
from remix_cli.data.rows import Rows
from remix_cli.data.splits import TrainingData
from remix_cli.errors import ArtefactError, RecipeError
from remix_cli.recipe import Recipe, Task
from remix_cli.recipe.schema import tasks_while_training
from remix_cli.runs import BegunWith, RunFolder
from remix_cli.train.checkpoints import CAUSES, Origin
from remix_cli.train.record import read_lines, step_of

MAY_CHANGE = {"output_dir", "eval"}  # recipe groups that a resumed run may set anew
MAY_CHANGE_TRAIN = {
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "project",
    "per_device_eval_batch_size",
}
STEPS = ("train.max_steps", "train.num_train_epochs")
PLACES = ("train.shard_base",)  # where the base lies changes how passes round at most
# Keys that came later, with the value at which a run is what it was before: it may be one that knew no such key.
LATER: dict[str, Any] = {"router.clusters": 0, "data.template_date": None}


def _binding(recipe: Recipe) -> dict[str, Any]:
    """Every value that a resumed run must keep, by dotted key."""

    def flatten(value: Any, at: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{at}.{key}").items()}
        return {at.removeprefix("."): value}

    free = {f"train.{name}" for name in MAY_CHANGE_TRAIN}
    values = flatten(recipe.model_dump(), "")
    kept = {k: v for k, v in values.items() if k not in free and k.split(".")[0] not in MAY_CHANGE}
    return {k: v for k, v in kept.items() if k not in LATER or v != LATER[k]}


@dataclass(frozen=True)
class Change:
    """A key that a resumed run must keep and does not; None stands for a value that is not set."""

    key: str
    now: Any
    was: Any

    def but(self, runs: str) -> str:
        """`train.max_steps: 6, but RUNS was begun with 24`; `runs` brings its verb."""
        now = "not set" if self.now is None else _shown(self.now)
        was = "without it" if self.was is None else f"with {_shown(self.was)}"
        return f"{self.key}: {now}, but {runs} begun {was}"


def check_same_recipe(new: Recipe, old: Recipe, folder: RunFolder) -> BegunWith:
    """A resumed run must be the run that was begun. Raises RecipeError naming every key that differs.

    Returned is what may differ, as the run was begun with it: where files lie, for what they hold is compared by its
    hashes; and how many steps there are, under a schedule that does not depend on that.
    """
    changed, free = compare_recipes(new, old)
    said = [change.but(f"{folder.path} was") for change in changed]
    if changed and all(change.key in STEPS for change in changed):
        raise RecipeError(
            f"{said[0]}, and its {new.train.lr_scheduler_type} schedule is laid out over all steps; train on from its "
            f"end, in a new output_dir, with adapter.init_from: {folder.path}"
        )
    if changed:
        raise RecipeError(*said, "a resumed run keeps its recipe; change it in a new output_dir")
    return free | folder.begun_with()


def compare_recipes(new: Recipe, old: Recipe) -> tuple[list[Change], BegunWith]:
    """What forbids a run of `old` to go on as `new`; and what may differ, as `old` has it."""
    before, after = _binding(old), _binding(new.with_date(old.data.template_date))
    differ = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    free = {key for key in differ if key in PLACES or _names_places(key, before.get(key), after.get(key))}
    if _is_open_ended(new) and _is_open_ended(old):
        free |= differ & set(STEPS)
    begun_with = {key: before.get(key) for key in free}
    if new.train.metric_for_best_model != "eval_loss":  # the best so far was chosen by these tasks
        for values, recipe in ((before, old), (after, new)):
            values |= {f"eval.tasks ({label})": task for label, task in tasks_while_training(recipe.eval.tasks)}
    changed = [
        Change(key, after.get(key), before.get(key))
        for key in sorted(before.keys() | after.keys())
        if key not in free and before.get(key) != after.get(key)
    ]
    return changed, begun_with


def has_other_steps(new: Recipe, old: Recipe) -> bool:
    """May the run be longer than it was to be?"""
    before, after = _binding(old), _binding(new)
    return any(before.get(key) != after.get(key) for key in STEPS)


def _names_places(key: str, before: Any, after: Any) -> bool:
    """Do two values of `key` differ in nothing but where files lie?"""
    if key == "model.name_or_path":
        return True
    if key not in ("data.train", "data.validation"):
        return False
    return _but_paths(before) == _but_paths(after)


def _but_paths(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in source.items() if key != "path"} for source in sources]


def _is_open_ended(recipe: Recipe) -> bool:
    """Are the learning rates of all steps the same, however many there will be?"""
    train = recipe.train
    with_warmup = train.lr_scheduler_type == "constant_with_warmup"
    return train.lr_scheduler_type == "constant" or (with_warmup and train.warmup_ratio == 0)


def _shown(value: Any) -> str:
    return repr(value.model_dump(exclude_defaults=True) if isinstance(value, Task) else value)


def check_nothing_was_saved(recipe: Recipe, folder: RunFolder, total: int) -> None:
    """With no checkpoint a run may start again only if none can have been saved. Raises ArtefactError.

    One is saved every `save_steps` and at the last of `total` steps; the records of a step are written before its
    checkpoint, so those of the first such step alone prove nothing.
    """
    first = min(recipe.train.save_steps or total, total)
    reached = max((step for step in map(step_of, read_lines(folder.metrics)) if step is not None), default=0)
    if reached > first or (total and folder.adapter.exists()):
        raise ArtefactError(
            f"{folder.checkpoints}: holds no checkpoint, although step {first} was saved; put the checkpoints back, or "
            "start again with --overwrite"
        )


def _digest(rows: Rows) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.input_ids.tobytes() + b"|" + row.supervised.tobytes() + b"\n")
    return digest.hexdigest()


def origin_of(recipe: Recipe, data: TrainingData, identity: BaseIdentity, begun_with: BegunWith) -> Origin:
    """Hashes of everything a checkpoint of this run belongs to; of the recipe as the run was begun with it."""
    values = _binding(recipe) | begun_with
    text = json.dumps(values, sort_keys=True)
    return Origin(
        recipe=hashlib.sha256(text.encode()).hexdigest(),
        data=_digest(data.train.rows),
        base=identity.base_fingerprint,
        tokenizer=identity.tokenizer_fingerprint,
        rows_per_step=data.plan.rows_per_step,
        held_out=_digest(data.validation.rows),
    )


def check_ranks(recipe: Recipe, origin: Origin, identity: BaseIdentity, processes: int) -> None:
    """All processes of a launch must train the same: each reads its own machine's files. Raises RecipeError."""
    if processes == 1:
        return
    works = {"settings": identity.base_settings, "probe": identity.tokenizer_probe}
    everyone = gather_object([asdict(origin) | works | {"recipe": recipe.model_dump_json()}])
    first = everyone[0]
    for rank, other in enumerate(everyone):
        causes = CAUSES | {"settings": "other settings of the base model", "probe": "another tokenizer"}
        different = [causes[name] for name, value in other.items() if value != first[name]]
        if different:
            raise RecipeError(
                f"rank {rank} was started with {' and '.join(different)} than rank 0; give every process the same "
                "command and the same files"
            )
