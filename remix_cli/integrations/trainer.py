"""Train a routed adapter with transformers.Trainer, or a trainer made of it.

What departs from an ordinary Trainer is its `training_step`: a batch takes M passes under sampled selections, and the
router's gradient is formed from their losses (core/step.py). Gradients are summed over the processes here, once a step,
because DDP counts backward passes and knows nothing of the router's gradient; so the model is not wrapped in it.
Launched by accelerate for FSDP2, the frozen base is shared out as `remix train` does it (train/shard.py), and to
accelerate it is a launch of plain processes: adapters stay whole, so all else here is the same.
Checkpoints hold the adapter, as `remix train` writes it, and what the Trainer writes itself. Draws are functions of
(args.seed, global step, row), so that a resumed run draws what an unbroken one would have.
"""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from remix_cli.compat.accelerate import asks_for_deepspeed, take_fsdp_launch
from remix_cli.compat.transformers import taken_for_adapted
from remix_cli.core.config import Precondition
from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.precondition import check_preconditioned, precondition_gradients
from remix_cli.core.step import BatchInputs, LoraGradient, MicroResult, accumulate_gradients, plan_passes
from remix_cli.core.step_routing import StepRouting
from remix_cli.core.store import load_stored
from remix_cli.cross_entropy import token_losses
from remix_cli.data.rows import EncodedRow
from remix_cli.integrations.model import RemixModel, prompts_of
from remix_cli.models.losses import at_positions, logits_at
from remix_cli.storage import write_json
from remix_cli.stored_json import read_object
from remix_cli.train.cluster_prompts import find_clusters, rows_to_cluster
from remix_cli.train.gradient_sums import GradientSums
from remix_cli.train.micro_batch import seed_of_dropout
from remix_cli.train.optim import clip
from remix_cli.train.sums import StepSums

ESTIMATOR_FILE = "remix_estimator.json"  # in a checkpoint: what the estimator has learnt
IGNORED = -100  # the label of a token that is not learnt
LOSSES_ALONE = ("labels", "shift_labels")  # of a batch, what the model is not given
WHOLE_MODEL_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")  # how their names begin
MADE_OF_A_MODEL = ("params", "model", "optimizer_dict")  # settings that stand in the place of groups of parameters

fsdp_launch = functools.cache(take_fsdp_launch)  # of this process, whose first trainer hides it from accelerate


@dataclass(frozen=True)
class RouterTraining:
    """How the router learns; what it is, `AdapterConfig` says.

    `selections`: M, sampled for each batch. `lora_gradient`: the LoRAs learn from all M selections (`mean`), from one
    of them, or from one more pass under the top k. `fixed`: the router keeps its random start, and a batch takes one
    pass. `balance`: weight of the load balance loss, for softmax routers. The defaults are a recipe's.
    """

    learning_rate: float = 0.3
    estimator: str = "control_variate"
    selections: int = 2
    lora_gradient: LoraGradient = "mean"
    fixed: bool = False
    balance: float = 0.0
    max_grad_norm: float = 1.0  # clipped apart from the LoRAs'


class _Whole(nn.Module):
    """The model as it is, in the place of DDP's: for the Trainer something that is wrapped already. A step calls the
    model itself."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.module(*args, **inputs)


class RemixTrainer(Trainer):
    """transformers.Trainer for a RemixModel: `RemixTrainer(get_remix_model(...), args, router=RouterTraining(...))`.

    Without `router` it stays as it begins. `precondition`: `riemannian` or `riemannian_unit` scales the LoRAs'
    gradients before they are clipped (core/precondition.py). All other arguments are the Trainer's. It makes a trainer
    of a Trainer's subclass, too, as the base class named first: `class Mine(RemixTrainer, SomeTrainer)`. Raises
    ValueError for settings of the Trainer that it cannot keep.
    """

    def __init__(
        self,
        model: RemixModel,
        *args: Any,
        router: RouterTraining | None = None,
        precondition: Precondition | None = None,
        **kwargs: Any,
    ):
        if not isinstance(model, RemixModel):
            raise ValueError("model: give what get_remix_model(model, config) returns")
        self.remix = model
        self.router = router or RouterTraining(fixed=True)
        self.precondition = precondition
        if precondition is not None:
            known = get_args(Precondition)
            if precondition not in known:
                raise ValueError(f"precondition: {precondition!r} is not known; use {' or '.join(known)}")
            check_preconditioned(model.adapter.config)
        self.estimator = make_estimator(self.router.estimator)
        self.launch = fsdp_launch()
        with taken_for_adapted(model.base_model):
            super().__init__(model.base_model, *args, **kwargs)
        self._check_settings()
        adapter = model.adapter
        for parameter in adapter.parameters().values():  # some trainers narrow what is trained
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if self.launch:
            self._share_base(self.launch.offload)
        self.passes = plan_passes(
            self.router.estimator,
            selections=self.router.selections,
            lora_gradient=self.router.lora_gradient,
            fixed=self.router.fixed,
            learns=self.router.learning_rate > 0,
            samples=adapter.config.samples,
        )
        self.loras = list(adapter.lora_parameters().values())
        self.routers = list(adapter.router_parameters().values())
        self.model_accepts_loss_kwargs = True  # so that targets are counted over the whole step
        self._loss_shifts_labels = True
        processes = self.accelerator.num_processes
        self._gradient_sums = GradientSums(self.loras, self.routers, processes, self.passes.with_gradient)
        self._results: list[MicroResult] = []  # of the step's micro-batches so far
        self._measured: dict[str, float] = {}  # of the last step, for the log
        if adapter.routers:
            adapter.find_local()  # by a pass of its own, before anything is wrapped
        self._recompute_activations()

    def _share_base(self, offload: bool) -> None:
        accelerator = self.accelerator
        accelerator.device_placement = False  # of models and batches: what is sharded stands where it is
        if not self.remix.shares_base:  # a second trainer of the same model finds it done
            self.remix.share_base(
                accelerator.device, accelerator.num_processes, offload=offload, tokenizer=self.processing_class
            )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Not a base that is to be shared out: no device need hold all of it."""
        if not self.launch:
            super()._move_model_to_device(model, device)

    def _recompute_activations(self) -> None:
        """If the arguments ask for it. They must not ask any more when the Trainer would do it, to whom nobody can
        give the context in which a recomputation repeats its selections."""
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # of transformers since 5.24, and before
            if getattr(self.args, name, False):
                self.remix.gradient_checkpointing_enable()
                setattr(self.args, name, False)

    def _check_settings(self) -> None:
        args: Any = self.args
        launched = self.launch is not None
        fsdp2 = "launch with accelerate's file for FSDP, with fsdp_version: 2, which shares the base out"
        refused = {
            "fsdp": (self.is_fsdp_enabled, fsdp2),  # of the arguments: a launch file's is hidden
            "fsdp_version": (self.launch is not None and self.launch.version != 2, "set it to 2 in the launch file"),
            "FSDP": (launched and self.accelerator.num_processes == 1, "one process has nobody to share with"),
            "even_batches": (
                launched and not self.accelerator.even_batches,
                "leave it at True; passes are collectives",
            ),
            "deepspeed": (self.is_deepspeed_enabled or asks_for_deepspeed(), fsdp2),
            "DataParallel": (args.n_gpu > 1, "launch with `accelerate launch` or torchrun, or show one GPU"),
            "torch_compile": (args.torch_compile, "leave it out"),
            "label_smoothing_factor": (args.label_smoothing_factor != 0, "leave it at 0"),
            "compute_loss_func": (self.compute_loss_func is not None, "leave it out; the loss is cross-entropy"),
            "average_tokens_across_devices": (not args.average_tokens_across_devices, "leave it at True"),
            "loss_type": (getattr(args, "loss_type", "nll") not in (None, "nll"), "use nll"),
        }
        for name, (asked_for, instead) in refused.items():
            if asked_for:
                raise ValueError(f"{name}: not with routed adapters; {instead}")
        if self.optimizer is None:
            self._optimizer_kind()

    def _optimizer_kind(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """The class that the arguments ask for, and its settings. Raises ValueError if it takes no groups of parameters
        or is not installed."""
        args: Any = self.args
        given = self.optimizer_cls_and_kwargs
        name = OptimizerNames(args.optim).value
        asked_for = f"optim: {name}" if given is None else f"optimizer_cls_and_kwargs: {given[0]}"
        refusal = "is made of a whole model, of which only LoRAs and routers are trained here; use adamw_torch"
        if given is None and name.startswith(WHOLE_MODEL_OPTIMIZERS):
            raise ValueError(f"{asked_for} {refusal}")  # before transformers asks to install it
        try:
            kind, settings = given or self.get_optimizer_cls_and_kwargs(args, self.remix.base_model)
        except (ImportError, ValueError) as error:  # transformers raises either where a package is missing
            said = str(error).rstrip(".")
            raise ValueError(f"{asked_for} is not to be had here ({said}); adamw_torch is always there") from error
        takes_groups = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if not takes_groups or set(settings) & set(MADE_OF_A_MODEL):
            raise ValueError(f"{asked_for} {refusal}")
        return kind, settings

    # One step.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradients of one micro-batch, under all its selections; the loss, (), as the Trainer averages it."""
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):  # schedule-free ones have a mode
            optimizer.train()
        inputs = self._prepare_inputs(inputs)
        batch = self._batch_inputs(inputs)
        targets = num_items_in_batch
        if targets is None:
            raise ValueError("labels: a batch without them has no loss; give the data collator's labels")
        if not self._results:
            self._gradient_sums.begin(self.current_gradient_accumulation_steps)
        seed = (self.args.seed, self.state.global_step)
        scaler = self.accelerator.scaler
        result = accumulate_gradients(
            self.remix.adapter,
            lambda: self._token_losses(inputs) / targets,
            batch,
            self.passes,
            self.estimator,
            seed=seed,
            backward=self._backward,
            loss_scale=scaler.get_scale() if scaler else 1.0,
            balance=self._balance(inputs, targets),
            dropout_seed=seed_of_dropout(seed, self._first_row()),
        )
        self._results.append(result)
        if self.accelerator.sync_gradients:
            self._end_step()
        return result.loss * self.accelerator.num_processes

    def _batch_inputs(self, inputs: dict[str, Any]) -> BatchInputs:
        """Row ids are unique within the step, over micro-batches and processes, as the draws need them."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = self._first_row() + torch.arange(len(ids), device=ids.device)
        if self.remix.adapter.config.level == "token":
            return BatchInputs(rows, real)
        positions = inputs.get("position_ids")
        if positions is not None and bool(((positions == 0) & real).sum(-1).gt(1).any()):
            raise ValueError("packing: several sequences in a row have one selection with level sequence; turn it off")
        return BatchInputs(rows, real, prompts_of(ids, real, inputs["labels"]))

    def _first_row(self) -> int:
        place = len(self._results) * self.accelerator.num_processes + self.accelerator.process_index
        return place * self.args.train_batch_size

    def _token_losses(self, inputs: dict[str, Any]) -> Tensor:
        """(B, T), at the position of the logit; 0 where nothing is learnt."""
        ids = inputs["input_ids"]
        following = inputs.get("shift_labels")
        if following is None:
            following = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        positions = (following != IGNORED).flatten().nonzero().flatten()  # (S,)
        given = {name: value for name, value in inputs.items() if name not in LOSSES_ALONE}
        with self.accelerator.autocast():
            logits = logits_at(self.remix.base_model, positions, **(given | {"use_cache": False}))
        return at_positions(token_losses(logits, following.flatten()[positions]), positions, ids)

    def _balance(self, inputs: dict[str, Any], targets: Tensor | int) -> float | Tensor:
        """This micro-batch's share of the step's balance loss."""
        if not self.router.balance or self.remix.adapter.config.samples:
            return 0.0
        return self.router.balance * ((inputs["labels"][:, 1:] != IGNORED).sum() / targets)

    def _backward(self, loss: Tensor) -> None:
        """Not the accelerator's, which would divide by accumulation steps; targets are counted over them all."""
        self._gradient_sums.before_backward()
        scaler = self.accelerator.scaler
        (scaler.scale(loss) if scaler else loss).backward()

    def _end_step(self) -> None:
        """Sums over the processes: of gradients, and of what estimator and log need."""
        self._gradient_sums.finish()
        if self.precondition:  # linear in the gradients, so a loss scale that is still in them does not matter
            precondition_gradients(self.remix.adapter, unit=self.precondition == "riemannian_unit")
        config = self.remix.adapter.config
        nothing = StepRouting.none(len(self.routers), config.pool_size, self.accelerator.device)
        sums = StepSums.of(self._results, nothing, self.estimator.sums, tokens=0, signal=0)
        self._results = []
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        packed = sums.pack(rank, world)
        if world > 1:
            packed = self.accelerator.reduce(packed, "sum")
        sums = sums.unpack(packed.cpu(), world)
        learnt_from = sums.learnt_from.tolist()
        if all(map(math.isfinite, learnt_from)):
            self.estimator.update(learnt_from)
        self._measured = sums.routing.summary()
        if self.passes.router_learns and self.passes.samples:
            self._measured["advantage_variance"] = float(sums.advantage_variance / sums.routing.decisions)
            self._measured |= self.estimator.logged()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """LoRAs and routers apart, as their gradients differ in scale; the norm of the LoRAs' before it."""
        self.accelerator.unscale_gradients()
        device = self.accelerator.device
        self._measured["router_grad_norm"] = float(clip(self.routers, self.router.max_grad_norm, device))
        return clip(self.loras, self.args.max_grad_norm, device)

    # What the Trainer asks its subclasses for.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's kind, with one group for the LoRAs and one, at its own rate and without decay, for routers."""
        if self.optimizer is None:
            kind, settings = self._optimizer_kind()
            groups = [{"params": self.loras, "weight_decay": self.args.weight_decay}]
            if self.routers and self.passes.router_learns:
                groups.append({"params": self.routers, "weight_decay": 0.0, "lr": self.router.learning_rate})
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if training and self.accelerator.num_processes > 1 and not isinstance(model, _Whole):
            return _Whole(model)
        return model

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._choosing(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _choosing(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        if self.remix.adapter.config.level == "token":
            return nullcontext()
        given = {name: inputs[name].to(self.args.device) for name in ("input_ids", "labels")}
        mask = inputs.get("attention_mask")
        return self.remix.routing(
            given["input_ids"], None if mask is None else mask.to(self.args.device), given["labels"]
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = logs | self._measured
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; clusters are found first, unless there is a checkpoint that has them."""
        if self.remix.adapter.config.clusters and not resume_from_checkpoint:
            self._find_clusters()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _find_clusters(self) -> None:
        """Of training prompts as the base model reads them: B is zero still."""
        adapter = self.remix.adapter
        dataset: Any = self.train_dataset
        rows = []
        for index in rows_to_cluster(range(len(dataset)), adapter.config.clusters, self.args.seed):
            collated = self.data_collator([dataset[index]])
            ids, labels = collated["input_ids"][0].numpy(), collated["labels"][0].numpy()
            rows.append(EncodedRow(ids, labels != IGNORED, "train"))
        find_clusters(adapter, rows, self.args.eval_batch_size, self.accelerator)

    # Folders.

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own, of the weights that an evaluation has: schedule-free optimizers train at others, to which
        the next step goes back. On every process, so that all keep the same."""
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "eval", None)):
            optimizer.eval()
        super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter, the tokenizer, and what the estimator has learnt."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        self.remix.save_pretrained(folder, tokenizer=self.processing_class)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        write_json(folder / ESTIMATOR_FILE, {"estimator": self.router.estimator, **self.estimator.state_dict()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Raises ArtefactError for a damaged one, ValueError for one of another adapter or estimator."""
        folder = Path(resume_from_checkpoint)
        self.remix.adapter.load(load_stored(folder).tensors)
        learnt = read_object(folder / ESTIMATOR_FILE)
        before = learnt.pop("estimator")
        if before != self.router.estimator:
            raise ValueError(f"{folder}: was trained by {before}; set RouterTraining(estimator={before!r})")
        self.estimator.load_state_dict(learnt)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None  # or the Trainer would not ask
        self.remix.adapter.load(load_stored(Path(best)).tensors)
