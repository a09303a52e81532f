"""From a recipe to everything that a run needs, in the order in which it must come.

1. `_read_data`: tokenizer and rows. Nothing large is in memory yet.
2. `_load_base`: the frozen model, what identifies it, and whether all processes were given the same.
3. `_adapt`: the method's adapter on it; the base shared out over the processes, if asked for. What it begins from is
   read now, and put into it when the first step is near (begin.py).
4. `_measure`: what is measured between steps. Its scorers read the model as it is now.
5. the rest: compilation, estimator, gradients, optimizer, schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from remix_cli.compat.transformers import recompute_activations
from remix_cli.core.estimators.base import Estimator
from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.patch import Adapter, compile_unadapted
from remix_cli.core.store import BaseIdentity, TrainedOn
from remix_cli.data.encode import Encoder
from remix_cli.data.splits import TrainingData, load_data
from remix_cli.data.template import day_for
from remix_cli.methods.apply import apply_method
from remix_cli.models import check_base, identify, load_model, load_tokenizer
from remix_cli.recipe import Recipe
from remix_cli.runs import BegunWith, RunFolder, Subject
from remix_cli.train import begin, optim
from remix_cli.train.begin import Beginning
from remix_cli.train.checkpoints import Origin, origin_of_last
from remix_cli.train.gradient_sums import GradientSums
from remix_cli.train.held_out import Evaluation
from remix_cli.train.micro_batch import EagerGradients, passes_of
from remix_cli.train.prepare import check_graphs
from remix_cli.train.resume import check_ranks, origin_of
from remix_cli.train.shard import load_to_share, shard_base
from remix_cli.train.step_graphs import StepGraphs


@dataclass(frozen=True)
class Setup:
    """All that a run needs and that does not change while it runs, weights and moments aside."""

    recipe: Recipe
    folder: RunFolder
    accelerator: Accelerator
    tokenizer: Any
    data: TrainingData
    total_steps: int
    model: Any  # with the adapter in place
    adapter: Adapter
    identity: BaseIdentity
    origin: Origin
    begun_with: BegunWith
    beginning: Beginning | None
    trained_on: TrainedOn
    evaluation: Evaluation
    estimator: Estimator
    gradients: EagerGradients | StepGraphs
    gradient_sums: GradientSums
    loras: list[nn.Parameter]
    routers: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]  # step, from 0 -> factor on both learning rates

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process


def set_up(
    recipe: Recipe, folder: RunFolder, accelerator: Accelerator, begun_with: BegunWith, *, begins: bool
) -> Setup:
    """Load and connect. Writes nothing. Raises RecipeError, DataError, ArtefactError.

    `begun_with`: what the recipe said otherwise when the run was begun. `begins`: or is there a checkpoint?
    """
    tokenizer = load_tokenizer(recipe.model)
    if begins:
        recipe = recipe.with_date(_today(tokenizer, recipe, accelerator))
    data = load_data(recipe, tokenizer, accelerator.num_processes)
    if not begins:
        data = _with_rows_as_begun(data, folder)
    model, identity, origin = _load_base(recipe, data, tokenizer, accelerator, begun_with)
    adapter = _adapt(recipe, model, tokenizer, accelerator)
    beginning = begin.read(recipe, adapter, identity, accelerator.num_processes) if begins else None
    evaluation = _measure(recipe, adapter, data, tokenizer, accelerator)
    if recipe.train.torch_compile:
        compile_unadapted(adapter.model)
    estimator = make_estimator(recipe.router.estimator)
    total_steps = data.total_steps(recipe) if recipe.method.trains else 0
    loras = list(adapter.lora_parameters().values()) if adapter.loras_learn else []
    routers = list(adapter.router_parameters().values())
    passes = passes_of(recipe.router, adapter.config.samples, adapter.loras_learn).with_gradient
    gradient_sums = GradientSums(loras, routers, accelerator.num_processes, passes)
    return Setup(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        tokenizer=tokenizer,
        data=data,
        total_steps=total_steps,
        model=adapter.model,
        adapter=adapter,
        identity=identity,
        origin=origin,
        begun_with=begun_with,
        beginning=beginning,
        trained_on=TrainedOn(origin.recipe, origin.data, data.held_out),
        evaluation=evaluation,
        estimator=estimator,
        gradients=_gradients(recipe, adapter, estimator, accelerator, gradient_sums),
        gradient_sums=gradient_sums,
        loras=loras,
        routers=routers,
        optimizer=optim.make_optimizer(adapter, recipe),
        schedule=optim.make_schedule(recipe, total_steps),
    )


def _today(tokenizer: Any, recipe: Recipe, accelerator: Accelerator) -> str | None:
    """The first process's day, which the run keeps: tomorrow its rows would be others. None if no row shows it."""
    day = [day_for(tokenizer, recipe.data)]
    if accelerator.num_processes > 1:
        broadcast_object_list(day)
    return day[0]


def _with_rows_as_begun(data: TrainingData, folder: RunFolder) -> TrainingData:
    """Steps have the rows that they had when the run was begun, perhaps by another number of processes."""
    origin = origin_of_last(folder.checkpoints)
    if origin is None:  # none can be read, which is told when the run is taken up
        return data
    return replace(data, plan=replace(data.plan, rows_per_step=origin.rows_per_step))


def _load_base(
    recipe: Recipe, data: TrainingData, tokenizer: Any, accelerator: Accelerator, begun_with: BegunWith
) -> tuple[Any, BaseIdentity, Origin]:
    """On the first process's host where it is to be sharded: no card need hold it whole."""
    if recipe.train.shard_base:
        model, identity = load_to_share(recipe, tokenizer, accelerator.is_main_process)
    else:
        model = load_model(recipe.model, accelerator.device)
        identity = identify(recipe.model, model, tokenizer)
    origin = origin_of(recipe, data, identity, begun_with)
    check_ranks(recipe, origin, identity, accelerator.num_processes)
    check_graphs(recipe, model)
    return model, identity, origin


def _adapt(recipe: Recipe, model: Any, tokenizer: Any, accelerator: Accelerator) -> Adapter:
    """The base is checked by a pass of its own: before the adapter where it is whole, after it where it is sharded,
    because only then does it stand on its devices."""
    sharded = bool(recipe.train.shard_base)
    if not sharded:
        check_base(model, len(tokenizer))
    adapter = apply_method(model, recipe.adapter_config(), seed=recipe.seed)
    if sharded:
        offload = recipe.train.shard_base == "offload"
        shard_base(adapter.model, adapter, accelerator.device, accelerator.num_processes, offload)
        check_base(adapter.model, len(tokenizer))
    if not recipe.adapter.train_loras:
        adapter.freeze_loras()
    adapter.find_local()  # by a pass of its own, before anything is compiled
    if recipe.train.gradient_checkpointing:
        replays = {"use_reentrant": False, "context_fn": adapter.state.checkpoint_contexts}
        recompute_activations(adapter.model, replays)
    return adapter


def _measure(
    recipe: Recipe, adapter: Adapter, data: TrainingData, tokenizer: Any, accelerator: Accelerator
) -> Evaluation:
    encoder = Encoder.of(tokenizer, recipe.data)
    subject = Subject(recipe, adapter.model, tokenizer, adapter, encoder)
    return Evaluation(subject, list(data.validation.rows), accelerator)


def _gradients(
    recipe: Recipe, adapter: Adapter, estimator: Estimator, accelerator: Accelerator, sums: GradientSums
) -> EagerGradients | StepGraphs:
    if recipe.train.cuda_graphs:  # a recorded pass calls nothing of ours while it is replayed
        return StepGraphs(adapter.model, adapter, recipe.router, estimator, accelerator.backward)

    def backward(loss: Tensor) -> None:
        sums.before_backward()
        accelerator.backward(loss)

    scaler = accelerator.scaler
    loss_scale = scaler.get_scale if scaler else lambda: 1.0
    return EagerGradients(adapter, recipe.router, estimator, accelerator.device, backward, loss_scale)
