"""The training run: steps, held-out loss, checkpoints, signals.

How it departs from a textbook loop: a step's gradient comes from M sampled passes (core/step.py); losses are
multiplied by their rows' weights and divided by the step's supervised tokens over all micro-batches and ranks, each
counted with its row's weight, so that weights compare rows and leave the learning rate alone (the routers' rewards are
these losses, too); LoRA gradients may be preconditioned (core/precondition.py); router and LoRA gradients are clipped
apart; data order and draws are functions of (seed, step), so a checkpoint holds no random state.
"""

import math
import signal
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from rich.console import Console

from remix_cli.core.precondition import precondition_gradients
from remix_cli.core.step import MicroResult
from remix_cli.core.step_routing import StepRouting
from remix_cli.core.store import load_stored, save_adapter
from remix_cli.data.batches import Order, collate, micro_batches
from remix_cli.diagnostics.health import Watch
from remix_cli.diagnostics.parameters import count_parameters
from remix_cli.errors import ArtefactError, DivergedError, Interrupted, RecipeError
from remix_cli.recipe import Recipe, load_recipe
from remix_cli.recipe.schema import cost, measures_while_training
from remix_cli.runs import BegunWith, RunFolder
from remix_cli.storage import lock_folder, publish_folder, recover, remove, storage_errors, write_json
from remix_cli.train import checkpoints, optim, prepare
from remix_cli.train.checkpoints import TrainingState
from remix_cli.train.cluster_prompts import find_clusters, rows_to_cluster
from remix_cli.train.console import TrainingConsole
from remix_cli.train.lines import say
from remix_cli.train.micro_batch import COUNTS_NOTHING
from remix_cli.train.pace import Pace
from remix_cli.train.record import Recorder, peak_memory, summarise, weights_of
from remix_cli.train.resume import check_nothing_was_saved, check_same_recipe, has_other_steps
from remix_cli.train.setup import Setup, set_up
from remix_cli.train.shard import as_launched, check_launch
from remix_cli.train.signals import Signals
from remix_cli.train.stopping import count_measurement, describe_stop, has_waited_enough
from remix_cli.train.sums import StepSums


def train(recipe: Recipe, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Run `recipe` to its end and return the summary that is also written to the run folder.

    Raises RecipeError, DataError, ArtefactError, BusyError, StorageError, DivergedError or Interrupted.
    """
    recipe = as_launched(recipe)
    folder = RunFolder(Path(recipe.output_dir))
    begins = not (resume and checkpoints.list_checkpoints(folder.checkpoints))
    skeleton = prepare.check_recipe(recipe, begins=begins)
    prepare.check_output(recipe, resume=resume, overwrite=overwrite)
    if resume:
        before = load_recipe(folder.recipe, stored=True)
        recipe = recipe.with_dtype_of(before).with_date(before.data.template_date)
    accelerator = Accelerator(
        mixed_precision="fp16" if recipe.model.dtype == "float16" else "no",
        # rank 0 may tokenise, evaluate or write for a while
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
    )
    prepare.check_hardware(recipe, accelerator.device)
    check_launch(recipe, accelerator.num_processes)
    main = accelerator.is_main_process
    begun_with: BegunWith = {}
    with lock_folder(folder.path) if main else nullcontext():
        if resume:
            begun_with = check_same_recipe(recipe, before, folder)
        if main:  # of a complete run too: the disk may have refused to remove the last scratch
            recover(folder.path)
            recover(folder.checkpoints)
        if resume and folder.summary.exists() and not has_other_steps(recipe, before):
            summary = folder.read_summary()  # a damaged one is named before anything is done about it
            problem = _problem_of(folder)
            if main:
                line = f"{problem}; taken from the last checkpoint" if problem else "already complete; nothing to do"
                say(console, f"{folder.path}: {line}")
            if not problem:
                return summary
        if main:
            prepare.check_space(recipe, skeleton)
        accelerator.wait_for_everyone()
        return _run(set_up(recipe, folder, accelerator, begun_with, begins=begins), console, resume)


def _problem_of(folder: RunFolder) -> str | None:
    """Why the adapter of a complete run is not what the run ended with, in one line."""
    try:
        load_stored(folder.adapter)
        other = folder.foreign(folder.adapter)
    except ArtefactError as error:
        return str(error)
    return f"{folder.adapter}: {other}" if other else None


def _run(setup: Setup, console: Console, resume: bool) -> dict[str, Any]:
    """Take up what was saved, open what is written to, and train."""
    state = (_restore(setup, console) if resume else None) or TrainingState()
    recorder = _open_folder(setup, state, resume, console)
    measures = measures_while_training(setup.recipe.eval.tasks)
    shown = [name for name, measure in measures.items() if measure.shown]
    with (
        recorder or nullcontext(),
        Signals() as signals,
        TrainingConsole(console, setup.total_steps, state.step, setup.is_main, shown) as view,
    ):
        Trainer(setup, state, recorder, signals, view).run()
    return _finish(setup, state)


def _restore(setup: Setup, console: Console) -> TrainingState | None:
    """Take up the newest checkpoint; None if there is none. Raises ArtefactError."""

    def tell(line: str) -> None:
        if setup.is_main:
            say(console, line)

    checkpoint, skipped = checkpoints.newest_valid(setup.folder.checkpoints)
    for line in skipped:
        tell(f"skipped a damaged checkpoint: {line}")
    if checkpoint is None:
        check_nothing_was_saved(setup.recipe, setup.folder, setup.total_steps)
        tell("no checkpoint was saved before the interruption: the run starts from step 0")
        return None
    state, different = checkpoints.restore(checkpoint, setup.adapter, setup.optimizer, setup.origin, setup.identity)
    if different:
        tell(f"not bit-reproducible: {', '.join(different)} when {checkpoint.name} was made")
    if state.step > setup.total_steps:
        raise RecipeError(
            f"train.max_steps: {setup.total_steps} steps, but {setup.folder.path} has done {state.step} already; give "
            "at least as many"
        )
    return state


def _open_folder(setup: Setup, state: TrainingState, resumed: bool, console: Console) -> Recorder | None:
    """Begin to write, on the main process: only now, for whatever could be refused has been, but for trackers."""
    if not setup.is_main:
        return None
    folder = setup.folder
    if resumed:
        with storage_errors(folder.summary):  # a kill must not leave what it says beside another adapter
            remove(folder.summary)
    else:
        prepare.clear_output(folder)
    folder.write_recipe(setup.recipe, setup.begun_with)

    def tell(line: str) -> None:
        say(console, line)

    try:
        return Recorder(setup.recipe, folder, state.step, state.evaluation_due, tell)
    except RecipeError:
        if not resumed:  # nothing is left behind that would have to be overwritten
            prepare.clear_output(folder)
        raise


def _finish(setup: Setup, state: TrainingState) -> dict[str, Any]:
    """Write down what the run ends with, and return it."""
    accelerator = setup.accelerator
    counts = count_parameters(setup.adapter)
    summary = summarise(setup.recipe, state, counts, setup.device, accelerator.num_processes)
    if setup.is_main:
        summary["adapters"] = weights_of(setup.folder)
        write_json(setup.folder.summary, summary)
    accelerator.wait_for_everyone()
    return summary


class Norms(NamedTuple):
    """Of a step's gradients before clipping."""

    lora: float
    router: float


class Trainer:
    """One run from `state` to its last step. `run` is the plan; the methods below are its parts, in order of use."""

    def __init__(
        self,
        setup: Setup,
        state: TrainingState,
        recorder: Recorder | None,  # on the main process
        signals: Signals,
        view: TrainingConsole,
    ):
        self.setup, self.recipe, self.folder = setup, setup.recipe, setup.folder
        self.accelerator, self.model, self.adapter = setup.accelerator, setup.model, setup.adapter
        self.state, self.recorder, self.signals, self.view = state, recorder, signals, view
        self.estimator = setup.estimator
        self.estimator.load_state_dict(state.coefficient)
        self.optimizer: Any = setup.accelerator.prepare(setup.optimizer)  # with the scaler of float16
        self.order = Order(setup.data.plan)
        self.watch = Watch(list(setup.adapter.routers), setup.adapter.config.active, setup.recipe.alarm)
        self.pace = Pace(state.seconds)

    def run(self) -> None:
        """Raises DivergedError, StorageError, Interrupted."""
        self.view.announce(
            self.recipe, self.setup.data, count_parameters(self.adapter), self.state.step, self.setup.total_steps
        )
        if self.state.step == 0 and not self.state.begun_from:
            self._begin()
        if self.state.step == 0 or self.state.evaluation_due:
            self._evaluate()
        self._step_ends()
        self._go_on_training()
        for step in range(self.state.step, self.setup.total_steps):
            if has_waited_enough(self.recipe, self.state):
                break
            asked_to_stop = self._step(step)
            if asked_to_stop:  # whoever asked has little patience: the held-out loss is for the resumed run
                self._stop()
            if self.state.evaluation_due:
                self._evaluate()
                self._go_on_training()
            self._step_ends()
            if self._is_due(self.recipe.train.save_steps) or has_waited_enough(self.recipe, self.state):
                self._save()
        if has_waited_enough(self.recipe, self.state):
            self.view.line(describe_stop(self.recipe, self.state))
        if self.setup.is_main:  # a process killed while it removed an old checkpoint left a part of it
            checkpoints.prune(self.folder.checkpoints, self.state.step, self.recipe.train.save_total_limit)
        self._write_adapter(self.folder.adapter)

    def _begin(self) -> None:
        """Clusters are found on the base model, so before the adapter is one that changes anything."""
        beginning = self.setup.beginning
        if beginning is None or not beginning.has_clusters:
            self._find_clusters()
        if beginning is not None:
            beginning.apply(self.adapter)
            self.state.begun_from = beginning.read
            self._save()  # from here on a resumed run needs the folders no more

    def _find_clusters(self) -> None:
        count = self.recipe.router.clusters
        if not count:
            return
        rows = rows_to_cluster(self.setup.data.train.rows, count, self.recipe.seed)
        every = len(self.setup.data.train.rows)
        self.view.line(
            f"clusters  {count}, by {len(rows):,} of {every:,} training prompts as the base model reads them"
        )
        size = self.recipe.train.per_device_eval_batch_size
        find_clusters(self.adapter, rows, size, self.accelerator, self.view.counting("prompts read", len(rows)))

    def _go_on_training(self) -> None:
        """After an evaluation, whose time is none of the training's."""
        self.model.train()
        self.pace.open_window()

    def _step(self, step: int) -> bool:
        """One update of the parameters; has a signal asked for an end, on any rank?"""
        rows = self.order.rows(step)
        sums, norms = self._gradients(step, rows)
        self._check_finite(step, rows, sums, norms)
        self._update(step, sums)
        self._note(step, sums, norms)
        return bool(sums.signals)

    def _gradients(self, step: int, rows: np.ndarray) -> tuple[StepSums, Norms]:
        """Of the whole step, over all ranks, clipped; and the sums that go with them. Two collectives, one transfer."""
        sums = self._accumulate(step, rows)
        self.setup.gradient_sums.finish()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        packed = sums.pack(rank, world)
        if world > 1:
            packed = self.accelerator.reduce(packed, "sum")
        self.accelerator.unscale_gradients(self.optimizer)
        if self.recipe.train.precondition:  # before clipping, which is of what AdamW is given: docs/methods.md
            unit = self.recipe.train.precondition == "riemannian_unit"
            precondition_gradients(self.adapter, unit=unit)
        device = self.setup.device
        lora_norm = optim.clip(self.setup.loras, self.recipe.train.max_grad_norm, device)
        router_norm = optim.clip(self.setup.routers, self.recipe.router.max_grad_norm, device)
        norms = torch.stack([lora_norm, router_norm]).double()
        on_host = torch.cat([norms, packed]).cpu()  # the step's one wait for the device
        return sums.unpack(on_host[2:], world), Norms(*on_host[:2].tolist())

    def _accumulate(self, step: int, rows: np.ndarray) -> StepSums:
        """Add up this rank's gradients of a step, micro-batch by micro-batch."""
        train_rows = self.setup.data.train
        targets_in_step = float((train_rows.target_counts[rows] * train_rows.weights[rows]).sum())
        cuts = micro_batches(
            rows,
            train_rows.lengths,
            self.recipe.train.per_device_train_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            equally_many=bool(self.recipe.train.shard_base),
            tokens=self.recipe.train.tokens_per_batch,
        )
        self.setup.gradient_sums.begin(len(cuts))
        results: list[MicroResult] = []
        tokens = 0
        for first_row, part, counts in cuts:
            batch = collate([train_rows.rows[i] for i in part], first_row, weighted=True)
            targets = targets_in_step if counts else COUNTS_NOTHING
            result = self.setup.gradients.accumulate(batch, targets, (self.recipe.seed, step))
            if counts:
                results.append(result)
                tokens += int(train_rows.lengths[part].sum())
        nothing = StepRouting.none(len(self.adapter.routers), self.adapter.config.pool_size, self.setup.device)
        return StepSums.of(results, nothing, self.estimator.sums, tokens, self.signals.received)

    def _check_finite(self, step: int, rows: np.ndarray, sums: StepSums, norms: Norms) -> None:
        """Raises DivergedError, before anything is updated."""
        loss = float(sums.loss)
        judged = [loss] if self.accelerator.scaler else [loss, *norms]  # a scaler skips overflowing gradients itself
        if all(map(math.isfinite, judged)):
            return
        what = f"loss {loss:.4g}, LoRA gradient norm {norms.lora:.4g}, router gradient norm {norms.router:.4g}"
        kept = checkpoints.list_checkpoints(self.folder.checkpoints)
        where = f"last checkpoint: {kept[-1]}" if kept else "no checkpoint was due yet"
        raise DivergedError(
            f"diverged at step {step + 1}: {what}; training rows {sorted(map(int, rows))[:8]}...; "
            f"nothing was updated; {where}; try a lower train.learning_rate"
        )

    def _rates(self, step: int) -> tuple[float, float]:
        """Learning rates of LoRAs and routers."""
        factor = self.setup.schedule(step)
        return self.recipe.train.learning_rate * factor, self.recipe.router.learning_rate * factor

    def _update(self, step: int, sums: StepSums) -> None:
        for group, rate in zip(self.setup.optimizer.param_groups, self._rates(step), strict=True):
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.setup.gradients.drops_gradients)
        learnt_from = sums.learnt_from.tolist()
        if all(map(math.isfinite, learnt_from)):
            self.estimator.update(learnt_from)

    def _note(self, step: int, sums: StepSums, norms: Norms) -> None:
        """Count the step; log it, if that is due."""
        done = step + 1
        tokens = int(sums.tokens)
        self.pace.add(tokens)
        self.state.step = done
        self.state.tokens += tokens
        self.state.seconds = self.pace.seconds
        self.state.evaluation_due = self._is_due(self.recipe.train.eval_steps)
        self.view.advance(done, float(sums.loss))
        if self.state.evaluation_due and self.recorder and self.adapter.config.routed:
            self.recorder.picture(done, list(self.adapter.routers), sums.routing.shares())
        if done > 1 and not self._is_due(self.recipe.train.logging_steps):
            return  # the first says how long the others will take
        rate, router_rate = self._rates(step)
        self._record(
            {
                "step": done,
                "epoch": round(done / self.setup.data.plan.steps_per_epoch, 4),
                "loss": float(sums.loss),
                "learning_rate": rate,
                "router_learning_rate": router_rate,
                "lora_grad_norm": norms.lora,
                "router_grad_norm": norms.router,
                **sums.routing.summary(),
                **self._estimator_record(sums),
                **self.pace.measures(),
                "peak_memory_gib": peak_memory(self.setup.device),
            }
        )
        warning = self.watch.see(sums.routing)
        if warning:
            self.view.line(warning)
        self.pace.open_window()

    def _estimator_record(self, sums: StepSums) -> dict[str, float]:
        if not self.adapter.config.samples or self.recipe.router.fixed:
            return {}
        found = {"advantage_variance": float(sums.advantage_variance) / float(sums.routing.decisions)}
        found["control_variate_beta"] = 0.0  # whatever the estimator: readers of earlier runs know it as a column
        return found | self.estimator.logged()

    def _is_due(self, every: int | None) -> bool:
        """After the last step everything is."""
        done = self.state.step
        return done == self.setup.total_steps or bool(every and done % every == 0)

    def _record(self, record: dict[str, Any]) -> None:
        if self.recorder:
            self.recorder.add(record)
            self.view.log(record)

    def _step_ends(self) -> None:
        if self.recorder:
            self.recorder.step_ends()

    def _evaluate(self) -> None:
        """Measure over all ranks; keeps the best adapter in `best/`. Raises DivergedError, Interrupted."""
        if self.setup.data.validation.rows:
            record = self.setup.evaluation.measure(self._heed_signals)
            if not math.isfinite(record["eval_loss"]):
                raise DivergedError(
                    f"held-out loss is {record['eval_loss']} after step {self.state.step}; "
                    "try a lower train.learning_rate"
                )
            self._record({"step": self.state.step, **record, "best": self._keep_best(record)})
            count_measurement(self.recipe, self.state, record)
        self.state.evaluation_due = False

    def _keep_best(self, record: dict[str, Any]) -> bool:
        """Is this the best so far? Then its adapter is written, too."""
        metric = self.recipe.train.metric_for_best_model
        now = cost(metric, float(record[metric]), self.recipe.eval.tasks)
        if self.state.best_cost is not None and now >= self.state.best_cost:
            return False
        self.state.best_cost, self.state.best_loss, self.state.best_step = now, record["eval_loss"], self.state.step
        if self.state.step or self.state.begun_from:
            self._write_adapter(self.folder.best)
        return True

    def _heed_signals(self, _: int) -> None:
        """Between batches of an evaluation; several processes must agree, so they stop at the next step."""
        if self.signals.received and self.accelerator.num_processes == 1:
            self._stop()

    def _stop(self) -> NoReturn:
        """Save and end; an evaluation that is due, or under way, is left to the resumed run. Raises Interrupted."""
        done = self.state.step
        if done:
            self._save()
        raise Interrupted(
            self.signals.received or signal.SIGTERM,
            f"interrupted after step {done}{'' if done else ', nothing to save'}; "
            f"go on with: remix train {self.folder.recipe} --resume",
        )

    def _write_adapter(self, target: Path) -> None:
        if not self.setup.is_main:
            return
        for name, parameter in self.adapter.parameters().items():
            if not torch.isfinite(parameter).all():
                raise DivergedError(f"{name} holds non-finite values after step {self.state.step}")
        with publish_folder(target, replace=True) as scratch:
            save_adapter(scratch, self.adapter, self.setup.identity, self.setup.trained_on)
            self.setup.tokenizer.save_pretrained(scratch)

    def _save(self) -> None:
        self.state.coefficient = self.estimator.state_dict()
        if self.setup.is_main:
            checkpoints.save_checkpoint(
                self.folder.checkpoints,
                self.state,
                self.adapter,
                self.setup.optimizer,
                self.setup.identity,
                self.setup.origin,
                self.setup.trained_on,
                self.recipe.train.save_total_limit,
            )
        self.accelerator.wait_for_everyone()
