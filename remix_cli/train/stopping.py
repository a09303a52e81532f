"""Early stopping: when a run has waited long enough for a better measurement.

What it knows is in the training state, and so in every checkpoint. A measurement counts where `train.eval_steps` has
it: one at the end of a run that is made longer later is none that the longer run would have made.
"""

from typing import Any

from remix_cli.recipe import Recipe
from remix_cli.recipe.schema import cost
from remix_cli.train.checkpoints import TrainingState


def count_measurement(recipe: Recipe, state: TrainingState, record: dict[str, Any]) -> None:
    """Take note of what was measured after `state.step`."""
    train = recipe.train
    if train.early_stopping_patience is None or train.eval_steps is None or state.step % train.eval_steps:
        return
    now = cost(train.metric_for_best_model, float(record[train.metric_for_best_model]), recipe.eval.tasks)
    if state.to_better is None or now < state.to_better - train.early_stopping_threshold:
        state.waited = 0
    else:
        state.waited += 1
    state.to_better = now if state.to_better is None else min(now, state.to_better)


def has_waited_enough(recipe: Recipe, state: TrainingState) -> bool:
    patience = recipe.train.early_stopping_patience
    return patience is not None and state.waited >= patience


def describe_stop(recipe: Recipe, state: TrainingState) -> str:
    metric = recipe.train.metric_for_best_model
    times = "1 measurement" if state.waited == 1 else f"{state.waited} measurements in a row"
    where = f"at step {state.best_step}, and is in {recipe.output_dir}/best"
    if not state.best_step and not state.begun_from:
        where = "before the first step: the base model"
    return f"stopped early after step {state.step}: {times} of {metric} did not better it; the best was {where}"
