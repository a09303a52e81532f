"""The training run: steps, held-out loss, checkpoints, signals.

How it departs from a textbook loop: a step's gradient comes from M sampled passes (step.py); losses are
divided by the step's supervised tokens over all micro-batches and ranks; router and LoRA gradients are
clipped apart; data order and draws are functions of (seed, step), so a checkpoint holds no random state.
"""

import math
import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from rich.console import Console

from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.patch import Adapter, compile_unadapted
from remix_cli.core.step_routing import StepRouting
from remix_cli.core.store import TrainedOn, load_stored, save_adapter
from remix_cli.data.batches import collate, micro_batches
from remix_cli.data.encode import Encoder
from remix_cli.data.splits import load_data
from remix_cli.diagnostics.health import Watch
from remix_cli.diagnostics.parameters import count_parameters
from remix_cli.errors import ArtefactError, DivergedError, Interrupted
from remix_cli.methods.apply import apply_method
from remix_cli.models import check_base, identify, load_model, load_tokenizer
from remix_cli.recipe import Recipe, load_recipe
from remix_cli.recipe.schema import cost, measures_while_training
from remix_cli.runs import RunFolder, Subject
from remix_cli.storage import lock_folder, publish_folder, recover, remove, storage_errors, write_json
from remix_cli.train import checkpoints, optim, prepare
from remix_cli.train.checkpoints import TrainingState
from remix_cli.train.cluster_prompts import find_clusters, rows_to_cluster
from remix_cli.train.console import TrainingConsole
from remix_cli.train.held_out import Evaluation
from remix_cli.train.record import Recorder, peak_memory, summarise, weights_of
from remix_cli.train.resume import check_nothing_was_saved, check_ranks, check_same_recipe, origin_of
from remix_cli.train.shard import check_launch, shard_base
from remix_cli.train.signals import Signals
from remix_cli.train.step import MicroResult, accumulate_gradients, seed_of_dropout
from remix_cli.train.step_graphs import StepGraphs


def train(recipe: Recipe, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Run `recipe` to its end and return the summary that is also written to the run folder.

    Raises RecipeError, DataError, ArtefactError, BusyError, StorageError, DivergedError or Interrupted.
    """
    skeleton = prepare.check_recipe(recipe)
    prepare.check_output(recipe, resume=resume, overwrite=overwrite)
    accelerator = Accelerator(
        mixed_precision="fp16" if recipe.model.dtype == "float16" else "no",
        # rank 0 may tokenise, evaluate or write for a while
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
    )
    prepare.check_hardware(recipe, accelerator.device)
    check_launch(recipe, accelerator.num_processes)
    folder = RunFolder(Path(recipe.output_dir))
    main = accelerator.is_main_process
    with lock_folder(folder.path) if main else nullcontext():
        if resume:
            check_same_recipe(recipe, load_recipe(folder.recipe, stored=True), folder)
        if main:  # of a complete run too: the disk may have refused to remove the last scratch
            recover(folder.path)
            recover(folder.checkpoints)
        if resume and folder.summary.exists():
            summary, problem = folder.read_summary(), _problem_of(folder)
            line = f"{problem}; taken from the last checkpoint" if problem else "already complete; nothing to do"
            if main:
                console.print(f"{folder.path}: {line}", highlight=False, soft_wrap=True)
            if not problem:
                return summary
        if main:
            prepare.check_space(recipe, skeleton)
        accelerator.wait_for_everyone()
        return _Run(recipe, accelerator, folder, console, resume).execute()


def _problem_of(folder: RunFolder) -> str | None:
    """Why the adapter of a complete run is not what the run ended with, in one line."""
    try:
        load_stored(folder.adapter)
        other = folder.foreign(folder.adapter)
    except ArtefactError as error:
        return str(error)
    return f"{folder.adapter}: {other}" if other else None


class _SignalDuringEvaluation(Exception):
    """SIGTERM or Ctrl-C while the held-out loss was being measured."""


class _Run:
    """One training run. `execute` is the plan; the methods below are its parts, in order of use."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, folder: RunFolder, console: Console, resume: bool):
        self.recipe, self.accelerator, self.folder = recipe, accelerator, folder
        self.main = accelerator.is_main_process
        self.console, self.resumed = console, resume
        self.tokenizer = load_tokenizer(recipe.model)
        self.data = load_data(recipe, self.tokenizer, accelerator.num_processes)
        trains = recipe.adapter.method != "none"
        self.total = self.data.total_steps(recipe) if trains else 0
        sharded = recipe.train.shard_base
        self.model = load_model(recipe.model, torch.device("cpu") if sharded else accelerator.device)
        self.identity = identify(recipe.model, self.model, self.tokenizer)
        self.origin = origin_of(recipe, self.data, self.identity)
        self.trained_on = TrainedOn(self.origin.recipe, self.origin.data, self.data.held_out)
        check_ranks(recipe, self.origin, self.identity, accelerator.num_processes)
        prepare.check_graphs(recipe, self.model)
        if not sharded:
            check_base(self.model, len(self.tokenizer))
        self.adapter: Adapter = apply_method(self.model, recipe.adapter_config(), seed=recipe.seed)
        self.model = self.adapter.model
        if sharded:
            shard_base(self.model, self.adapter, accelerator.device, accelerator.num_processes)
            check_base(self.model, len(self.tokenizer))
        self.loras = list(self.adapter.lora_parameters().values())
        self.routers = list(self.adapter.router_parameters().values())
        if recipe.train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self.adapter.state.checkpoint_contexts}
            )
        encoder = Encoder.of(self.tokenizer, recipe.data)
        subject = Subject(recipe, self.model, self.tokenizer, self.adapter, encoder)
        self.evaluation = Evaluation(subject, self.data.validation.rows, accelerator)
        if recipe.train.torch_compile:
            compile_unadapted(self.model)
        self.estimator = make_estimator(recipe.router.estimator)
        self.graphs: StepGraphs | None = None
        if recipe.train.cuda_graphs:
            self.graphs = StepGraphs(self.model, self.adapter, recipe.router, self.estimator, accelerator.backward)
        self.optimizer = optim.make_optimizer(self.adapter, recipe)
        self.state = TrainingState()
        restored = resume and self._restore()
        self.clusters_due = recipe.router.clusters > 0 and not restored
        self.schedule = optim.make_schedule(recipe, self.total)
        self.prepared = accelerator.prepare(self.optimizer)
        self.estimator.load_state_dict(self.state.coefficient)
        self.begun = time.monotonic() - self.state.seconds
        self._open_window()
        self.watch = Watch(list(self.adapter.routers), self.adapter.config.active, recipe.alarm)
        self.epoch_plan: tuple[int, list] = (-1, [])
        self.recorder: Recorder | None = None  # on the main process

    def execute(self) -> dict[str, Any]:
        if self.main:
            if not self.resumed:  # only now: whatever could be refused has been
                prepare.clear_output(self.folder)
            else:
                with storage_errors(self.folder.summary):  # a kill must not leave what it says beside another adapter
                    remove(self.folder.summary)
            self.folder.write_recipe(self.recipe)
            self.recorder = Recorder(self.recipe, self.folder, self.state.step, self.state.evaluation_due)
        with (
            Signals() as self.signals,
            TrainingConsole(self.console, self.total, self.state.step, self.main, self._shown()) as self.view,
        ):
            self.view.announce(self.recipe, self.data, count_parameters(self.adapter), self.state.step, self.total)
            if self.clusters_due:
                self._find_clusters()
            if self.state.step == 0 or self.state.evaluation_due:
                self._evaluate_or_stop()
            self.model.train()
            self._open_window()
            for step in range(self.state.step, self.total):
                self._step(step)
        if self.main:  # a process killed while it removed an old checkpoint left a part of it
            checkpoints.prune(self.folder.checkpoints, self.state.step, self.recipe.train.save_total_limit)
        self._write_adapter(self.folder.adapter)
        return self._summary()

    def _shown(self) -> list[str]:
        measures = measures_while_training(self.recipe.eval.tasks)
        return [name for name, measure in measures.items() if measure.shown]

    def _find_clusters(self) -> None:
        count = self.recipe.router.clusters
        rows = rows_to_cluster(self.data.train.rows, count, self.recipe.seed)
        self.view.line(f"clusters  {count}, of {len(rows)} training prompts as the base model reads them")
        find_clusters(self.adapter, rows, self.recipe.train.per_device_eval_batch_size, self.accelerator)

    def _open_window(self) -> None:
        """Start measuring speed anew: after a log line, and after an evaluation, which is not training."""
        self.window_steps, self.window_tokens, self.window_begun = 0, 0, time.monotonic()

    def _rows(self, step: int) -> Any:
        epoch, index = divmod(step, self.data.plan.steps_per_epoch)
        if self.epoch_plan[0] != epoch:
            self.epoch_plan = (epoch, self.data.plan.epoch(epoch))
        return self.epoch_plan[1][index]

    def _step(self, step: int) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        rows = self._rows(step)
        results, tokens = self._accumulate(step, rows)
        optim.sum_over_ranks(accelerator, self.loras + self.routers)
        sums, routing = self._reduce(results, tokens)
        accelerator.unscale_gradients(self.prepared)
        norms = torch.stack(
            [
                optim.clip(self.loras, recipe.train.max_grad_norm, accelerator.device),
                optim.clip(self.routers, recipe.router.max_grad_norm, accelerator.device),
            ]
        )
        lora_norm, router_norm = norms.tolist()  # the step's one synchronisation
        loss, variance, all_tokens, stop, *of_estimator = sums.tolist()
        judged = (
            (loss,) if accelerator.scaler else (loss, lora_norm, router_norm)
        )  # a scaler skips overflowing gradients itself
        if not all(map(math.isfinite, judged)):
            raise DivergedError(self._divergence(step, rows, loss, lora_norm, router_norm))
        rates = [base * self.schedule(step) for base in (recipe.train.learning_rate, recipe.router.learning_rate)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.prepared.step()
        self.prepared.zero_grad(set_to_none=self.graphs is None)
        if all(map(math.isfinite, of_estimator)):
            self.estimator.update(of_estimator)
        self._after_step(
            step + 1,
            {
                "step": step + 1,
                "epoch": round((step + 1) / self.data.plan.steps_per_epoch, 4),
                "loss": loss,
                "learning_rate": rates[0],
                "router_learning_rate": rates[1],
                "lora_grad_norm": lora_norm,
                "router_grad_norm": router_norm,
                **routing.summary(),
                **self._estimator_record(variance, routing),
            },
            int(all_tokens),
            bool(stop),
            routing,
        )

    def _accumulate(self, step: int, rows: Any) -> tuple[list[MicroResult], int]:
        """Add up this rank's gradients of a step; the sums that go with them, and how many tokens that was."""
        recipe, accelerator = self.recipe, self.accelerator
        scaler = accelerator.scaler
        targets = int(self.data.train.target_counts[rows].sum())
        size = recipe.train.per_device_train_batch_size
        results: list[MicroResult] = []
        tokens = 0
        for first, part, counts in micro_batches(
            rows,
            self.data.train.lengths,
            size,
            accelerator.process_index,
            accelerator.num_processes,
            equally_many=recipe.train.shard_base,
        ):
            batch = collate([self.data.train.rows[i] for i in part], first)
            if self.graphs:
                results.append(self.graphs.accumulate(batch, targets, (recipe.seed, step)))
            else:
                result = accumulate_gradients(
                    self.model,
                    self.adapter,
                    batch.to(accelerator.device),
                    recipe.router,
                    self.estimator,
                    targets_in_step=targets if counts else math.inf,
                    seed=(recipe.seed, step),
                    numbers=self.estimator.numbers(),
                    backward=accelerator.backward,
                    loss_scale=scaler.get_scale() if scaler else 1.0,
                    dropout_seed=seed_of_dropout((recipe.seed, step), first),
                )
                results += [result] if counts else []
            tokens += int(self.data.train.lengths[part].sum()) if counts else 0
        return results, tokens

    def _estimator_record(self, variance: float, routing: StepRouting) -> dict[str, float]:
        if not self.adapter.config.samples or self.recipe.router.fixed:
            return {}
        found = {"advantage_variance": variance / float(routing.decisions)}
        found["control_variate_beta"] = 0.0  # whatever the estimator: readers of earlier runs know it as a column
        return found | self.estimator.logged()

    def _reduce(self, results: list[MicroResult], tokens: int) -> tuple[torch.Tensor, StepRouting]:
        """Float64 sums over micro-batches and ranks, and the routing; one collective, one transfer.

        The sums: loss, variance of the advantages, tokens, signals, and what the estimator learns from.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        device = self.accelerator.device
        nothing = StepRouting.none(len(self.adapter.routers), self.adapter.config.pool_size, device)
        routing = StepRouting.add([nothing, *(r.routing for r in results)])
        parts = [torch.zeros(2 + self.estimator.sums, dtype=torch.float64, device=device)]
        parts += [torch.stack([r.loss, r.advantage_variance * r.routing.decisions, *r.sums]).double() for r in results]
        measured = torch.stack(parts).sum(0)
        counted = torch.tensor([tokens, float(self.signals.received)], dtype=torch.float64, device=device)
        sums = torch.cat([measured[:2], counted, measured[2:]])
        worst = torch.zeros(world, dtype=torch.float64, device=device)
        worst[rank] = routing.worst  # each rank in its own place, so that a sum gathers them
        total = torch.cat([sums, routing.sums.flatten(), worst, routing.used.flatten()])
        if world > 1:
            total = self.accelerator.reduce(total, "sum")
        sizes = [len(sums), routing.sums.numel(), world, routing.used.numel()]
        sums, means, lowest, used = total.cpu().split(sizes)
        return sums, StepRouting(means.view_as(routing.sums), used.view_as(routing.used), lowest.amin())

    def _divergence(self, step: int, rows: Any, loss: float, lora_norm: float, router_norm: float) -> str:
        what = f"loss {loss:.4g}, LoRA gradient norm {lora_norm:.4g}, router gradient norm {router_norm:.4g}"
        kept = checkpoints.list_checkpoints(self.folder.checkpoints)
        where = f"last checkpoint: {kept[-1]}" if kept else "no checkpoint was due yet"
        return (
            f"diverged at step {step + 1}: {what}; training rows {sorted(map(int, rows))[:8]}...; "
            f"nothing was updated; {where}; try a lower train.learning_rate"
        )

    def _after_step(self, done: int, record: dict[str, Any], tokens: int, stop: bool, routing: StepRouting) -> None:
        recipe = self.recipe
        self.state.step = done
        self.state.tokens += tokens
        self.state.seconds = time.monotonic() - self.begun
        self.window_steps += 1
        self.window_tokens += tokens
        self.view.advance(done, record["loss"])
        last = done == self.total
        if done % recipe.train.logging_steps == 0 or last:
            spent = time.monotonic() - self.window_begun
            record["tokens_per_second"] = self.window_tokens / spent
            record["step_seconds"] = spent / self.window_steps
            record["peak_memory_gib"] = peak_memory(self.accelerator.device)
            self._record(record)
            warning = self.watch.see(routing)
            if warning:
                self.view.line(warning)
            self._open_window()
        every = recipe.train.eval_steps
        self.state.evaluation_due = last or bool(every and done % every == 0)
        if stop:  # whoever asked has little patience: the held-out loss is for the resumed run
            self._stop()
        if self.state.evaluation_due:
            self._evaluate_or_stop()
            self.model.train()
            self._open_window()
        every = recipe.train.save_steps
        if last or (every and done % every == 0):
            self._save()

    def _evaluate_or_stop(self) -> None:
        try:
            self._evaluate()
        except _SignalDuringEvaluation:
            self._stop()
        self.state.evaluation_due = False

    def _stop(self) -> NoReturn:
        """Save and end. Raises Interrupted."""
        done = self.state.step
        if done:
            self._save()
        raise Interrupted(
            self.signals.received or signal.SIGTERM,
            f"interrupted after step {done}{'' if done else ', nothing to save'}; "
            f"go on with: remix train {self.folder.recipe} --resume",
        )

    def _record(self, record: dict[str, Any]) -> None:
        if self.recorder:
            self.recorder.add(record)
            self.view.log(record)

    def _evaluate(self) -> None:
        """Measure over all ranks; keeps the best adapter in `best/`."""
        if not self.data.validation.rows:
            return
        record = self.evaluation.measure(self._heed_signals)
        loss, metric = record["eval_loss"], self.recipe.train.metric_for_best_model
        if not math.isfinite(loss):
            raise DivergedError(
                f"held-out loss is {loss} after step {self.state.step}; try a lower train.learning_rate"
            )
        now = cost(metric, float(record[metric]), self.recipe.eval.tasks)
        best = self.state.best_cost is None or now < self.state.best_cost
        if best:
            self.state.best_cost, self.state.best_loss, self.state.best_step = now, loss, self.state.step
            if self.state.step:
                self._write_adapter(self.folder.best)
        self._record({"step": self.state.step, **record, "best": best})

    def _heed_signals(self, _: int) -> None:
        """Between batches of an evaluation; several processes must agree, so they stop at the next step."""
        if self.signals.received and self.accelerator.num_processes == 1:
            raise _SignalDuringEvaluation

    def _write_adapter(self, target: Path) -> None:
        if not self.main:
            return
        for name, parameter in self.adapter.parameters().items():
            if not torch.isfinite(parameter).all():
                raise DivergedError(f"{name} holds non-finite values after step {self.state.step}")
        with publish_folder(target, replace=True) as scratch:
            save_adapter(scratch, self.adapter, self.identity, self.trained_on)
            self.tokenizer.save_pretrained(scratch)

    def _save(self) -> None:
        self.state.coefficient = self.estimator.state_dict()
        if self.main:
            keep = self.recipe.train.save_total_limit
            checkpoints.save_checkpoint(
                self.folder.checkpoints,
                self.state,
                self.adapter,
                self.optimizer,
                self.identity,
                self.origin,
                self.trained_on,
                keep,
            )
        self.accelerator.wait_for_everyone()

    def _restore(self) -> bool:
        """Take up the newest checkpoint, if there is one."""
        checkpoint, skipped = checkpoints.newest_valid(self.folder.checkpoints)
        for line in skipped:
            self._tell(f"skipped a damaged checkpoint: {line}")
        if checkpoint is None:
            check_nothing_was_saved(self.recipe, self.folder, self.total)
            self._tell("no checkpoint was saved before the interruption: the run starts from step 0")
            return False
        self.state, different = checkpoints.restore(
            checkpoint, self.adapter, self.optimizer, self.origin, self.identity
        )
        if different:
            self._tell(f"not bit-reproducible: {', '.join(different)} when {checkpoint.name} was made")
        return True

    def _tell(self, line: str) -> None:
        if self.main:
            self.console.print(line, highlight=False, soft_wrap=True)

    def _summary(self) -> dict[str, Any]:
        counts = count_parameters(self.adapter)
        accelerator = self.accelerator
        summary = summarise(self.recipe, self.state, counts, accelerator.device, accelerator.num_processes)
        if self.recorder:
            self.recorder.close()
            summary["adapters"] = weights_of(self.folder)
            write_json(self.folder.summary, summary)
        accelerator.wait_for_everyone()
        return summary
