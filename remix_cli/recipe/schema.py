"""Every key a recipe may hold. Strict: no unknown key, no silent conversion, no value out of range.

The descriptions are what `remix schema` prints and editors show. Defaults are stated here and nowhere else.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self, get_args

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from remix_cli.core.config import ALL_LINEAR, AdapterConfig, Level, Omega, Precondition, Scope
from remix_cli.core.estimators.registry import ESTIMATORS
from remix_cli.methods.registry import METHODS, method_named, methods_by_name
from remix_cli.own_settings import fields_of, listed
from remix_cli.recipe.machine import usual_dtype
from remix_cli.recipe.rules import fill_defaults, idle_in_router, unread_of_router
from remix_cli.recipe.sources import (
    NONE_HELD_OUT,
    Data,
    Place,
    Places,
    Positive,
    Seed,
    Share,
    Source,
    Strict,
    name_in,
    refuse_unread,
)
from remix_cli.tasks.registry import TASKS, task_class, task_classes

if TYPE_CHECKING:
    from remix_cli.methods.base import Method
    from remix_cli.tasks.base import Measure

HIGHEST_RATE = 10.0  # that a recipe takes
Rate = Annotated[float, Field(gt=0, le=HIGHEST_RATE)]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "dvclive"]  # those of train/tracker_tools.py
TRACKERS: tuple[str, ...] = get_args(TrackerName)
TaskName: Any = name_in(TASKS)
CONFIG_FIELDS = {field.name for field in fields(AdapterConfig)}
EstimatorName: Any = name_in(ESTIMATORS)
MethodName: Any = name_in(METHODS)
SUMMARIES = "; ".join(f"{name}: {method.summary}" for name, method in methods_by_name().items())


def _readers(key: str) -> list[str]:
    """The methods that read `adapter.<key>` or `router.<key>`."""
    methods = methods_by_name().items()
    return [name for name, method in methods if key in (*method.settings, *method.router_settings)]


class Model(Strict):
    name_or_path: Place = Field(description="Hub id, model folder, or .gguf file.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default_factory=usual_dtype,
        description="Type of the frozen weights and of the computation; adapters are always float32. By default "
        "bfloat16, and float32 on a CPU that computes slowly in bfloat16.",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Keep the frozen weights in 8 or 4 bits (bitsandbytes: LLM.int8, NF4 with double quantisation).",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = Field(False, description="Run modelling code that the model folder brings along.")

    @property
    def about_dtype(self) -> str | None:
        """What to say of a type that the recipe leaves to the machine, where it is not the usual one."""
        if "dtype" in self.model_fields_set or self.dtype == "bfloat16":
            return None
        return f"{self.dtype}, for this CPU computes slowly in bfloat16; model.dtype says otherwise"

    @property
    def is_local(self) -> bool:
        """A folder or file of this machine, and no hub id."""
        name = self.name_or_path
        return name.startswith((".", "/", "~", "models/")) or name.endswith(".gguf") or name.count("/") > 1


def _names(value: Any) -> Any:
    return [value] if value == ALL_LINEAR else value


NAMES: dict[str, Any] = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
Names = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1),
    BeforeValidator(_names),
    WithJsonSchema({"anyOf": [{"const": ALL_LINEAR}, NAMES]}),
]


OF_THE_BEGINNING = ("init_from", "train_loras")  # what the adapter is trained from, and no part of what it is


class AdapterSettings(Strict):
    method: MethodName = Field("remix", description=f"{SUMMARIES}.")
    pool_size: Positive = Field(8, description="n, LoRAs in each pool.")
    active: Positive = Field(4, description="k, LoRAs in use for each token.")
    rank: Positive = Field(8, description="r, rank of each LoRA.")
    omega: Omega = Field("rslora", description="Weight of an active LoRA: 2/sqrt(k r) (rslora) or 2/(k r) (lora).")
    target_modules: Names = Field(
        ["gate_proj", "up_proj", "down_proj"],
        description="Ends of module names, or regular expressions; all-linear: every linear layer but the output's.",
    )
    dropout: Share = 0.0
    init_from: Places | None = Field(
        None,
        description="Begin from a run or adapter folder of the same method and shape; or from LoRAs, PEFT folders or "
        "runs of lora and rslora, one for each of the pool.",
    )
    train_loras: bool = Field(True, description="remix: false keeps the LoRAs of init_from and trains the router.")

    @model_validator(mode="after")
    def _only_own_settings(self) -> Self:
        own = method_named(self.method).settings
        other = sorted(self.model_fields_set - {"method", *self._own()})
        if other:
            also = f" (nor is {', '.join(other[1:])})" if other[1:] else ""
            raise PydanticCustomError(
                "conflict",
                "not a setting of {method}{also}, which takes {own}; leave it out, or set the whole group: "
                "'adapter={method: {method}}'",
                {"method": self.method, "also": also, "own": ", ".join(own) or "none", "at": ("adapter", other[0])},
            )
        return self

    @model_serializer(mode="wrap")
    def _dump_own_settings(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = ("method", *self._own())
        silent = [key for key in OF_THE_BEGINNING if getattr(self, key) == type(self).model_fields[key].default]
        return {key: value for key, value in dump(self).items() if key in own and key not in silent}

    def _own(self) -> tuple[str, ...]:
        """The settings that the method reads."""
        method = method_named(self.method)
        return (*method.settings, "init_from") if method.trains else method.settings

    @field_validator("active")
    @classmethod
    def _active_fits(cls, active: int, info: ValidationInfo) -> int:
        method = info.data.get("method")
        if method in METHODS and "pool_size" not in method_named(method).settings:
            return active  # which AdapterConfig compares with what there is
        pool_size = info.data.get("pool_size", active)
        if active > pool_size:
            raise ValueError(f"k = {active} LoRAs cannot be active in a pool of n = {pool_size} (adapter.pool_size)")
        return active


def _own_settings() -> dict[str, Any]:
    brought = [method.own_settings for method in methods_by_name().values()]
    return fields_of(brought, _readers)


# The type checker knows the settings that methods share; those they bring along are read by name.
if TYPE_CHECKING:
    Adapter = AdapterSettings
else:
    Adapter = create_model("Adapter", __base__=AdapterSettings, __module__=__name__, **_own_settings())


class Router(Strict):
    """How the router works and learns; read by methods that have one."""

    selections: Positive = Field(2, description="M, selections sampled for each batch; the baseline needs 2.")
    estimator: EstimatorName = Field(
        "control_variate",
        description="How the router's gradient is estimated. straight_through is biased; the others are not.",
    )
    fixed: bool = Field(
        False,
        description="Never train the router: the top k of its random start, in training too, in one pass. By default "
        "so, unless another key says how it is trained.",
    )
    lora_gradient: Literal["mean", "one", "top"] = Field(
        "mean",
        description="LoRA gradient from all M selections, from one of them, or from one more pass under the top k; "
        "the passes that it does not come from run without gradients.",
    )
    scope: Scope = Field("block", description="One router for each FFN block, each adapted module, or the whole model.")
    level: Level = Field(
        "token",
        description="One selection for each token, or one for each sequence, made from its prompt and kept.",
    )
    clusters: Annotated[int, Field(ge=0, le=4096)] = Field(
        0,
        description="With level: sequence, read which of so many clusters a prompt is in; 0: the prompt's mean.",
    )
    learning_rate: Annotated[float, Field(ge=0, le=100)] = Field(
        0.3,
        description="The router's own; 0 freezes it. Its input has unit length whatever the model.",
    )
    init_std: Annotated[float, Field(ge=0, le=10)] = Field(0.02, description="Spread of the router's initial weights.")
    unit_input: bool = Field(
        True, description="The router reads x / |x|; false: x itself, as published (then use a rate near 1e-2)."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Clipped apart from the LoRAs' gradient.")
    balance: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0, description=f"{listed(_readers('balance'))}: weight of the load balance loss, by default 0.01."
    )


class Train(Strict):
    learning_rate: Rate = Field(1e-3, description="By default the method's own: 1e-3 for remix.")
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = Field(None, description="Stop after so many steps; overrides num_train_epochs.")
    per_device_train_batch_size: Positive = 8
    per_device_eval_batch_size: Positive = 16
    gradient_accumulation_steps: Positive = 1
    tokens_per_batch: Positive | None = Field(
        None,
        description="Micro-batches of at most so many tokens, padding counted, instead of "
        "per_device_train_batch_size rows; a step keeps its rows.",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precondition: Precondition | None = Field(
        None,
        description="riemannian: before clipping and AdamW, scale the gradient of each LoRA's A by the inverse of "
        "B^T B and that of B by the inverse of A A^T; riemannian_unit: by these at unit mean eigenvalue.",
    )
    group_by_length: bool = Field(True, description="Batches of like length: less padding.")
    torch_compile: bool = Field(
        False, description="Compile what is not adapted (attention, norms): a minute at the start, faster on a GPU."
    )
    cuda_graphs: bool = Field(
        False,
        description="Record the step of each batch shape and replay it: faster where steps wait for the host.",
    )
    shard_base: Literal[False, True, "offload"] = Field(
        False,
        description="Share the frozen base model out over the processes, gathered layer by layer (FSDP2); offload: "
        "from host memory.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations; selections are replayed.")
    logging_steps: Positive = 10
    eval_steps: Positive | None = Field(None, description="Held-out loss every so many steps, and at the end.")
    eval_tasks_limit: Positive | None = Field(
        None, description="Also score eval.tasks, on so many rows each, whenever the held-out loss is measured."
    )
    metric_for_best_model: str = Field(
        "eval_loss", description="What `best/` is best at: eval_loss or <task>/<score>, for example gsm8k/flexible."
    )
    early_stopping_patience: Positive | None = Field(
        None,
        description="End the run after so many measurements in a row (eval_steps apart) that did not better the best "
        "metric_for_best_model; best/ has that adapter.",
    )
    early_stopping_threshold: Annotated[float, Field(ge=0)] = Field(
        0.0, description="By more than this a measurement must better the best, to count as better."
    )
    save_steps: Positive | None = Field(None, description="Checkpoint every so many steps, and at the end.")
    save_total_limit: Positive = 2
    report_to: Literal["none"] | TrackerName | Annotated[list[TrackerName], Field(min_length=1)] = Field(
        "none", description="Trackers that show the run while it goes on: one, or a list."
    )
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,80}$")] = Field(
        "remix", description="What the trackers call the project, or experiment, that the run is part of."
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _known_trackers(cls, value: Any) -> Any:
        """One problem in place of one for each way in which this can be written."""
        names = value if isinstance(value, list) else [value]
        known = value == "none" or all(name in TRACKERS for name in names)
        if not known or not names or len(set(names)) < len(names):
            raise ValueError(f"should be none, or one or more of {', '.join(TRACKERS)}, each once")
        return value

    @property
    def trackers(self) -> list[str]:
        if isinstance(self.report_to, str):
            return [] if self.report_to == "none" else [self.report_to]
        return [*self.report_to]

    @model_serializer(mode="wrap")
    def _dump_without_silent_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A run that says nothing in younger keys is the run that it was before them."""
        younger = ("early_stopping_patience", "early_stopping_threshold", "precondition", "tokens_per_batch")
        silent = [key for key in younger if getattr(self, key) == type(self).model_fields[key].default]
        return {key: value for key, value in dump(self).items() if key not in silent}


OF_ANSWERS = ("max_new_tokens", "temperature")  # keys of tasks that generate


TaskLabel = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,80}$")]


class TaskSettings(Strict):
    task: TaskName
    source: Source | None = Field(None, description="Rows to score; by default the recipe's held-out rows.")
    limit: Positive | None = Field(None, description="Score so many rows, spread evenly over all.")
    shots: Annotated[int, Field(ge=0, le=64)] = Field(0, description="Solved examples in front of each question.")
    shots_from: Source | None = Field(None, description="Where those come from: its first rows.")
    max_new_tokens: Positive | None = Field(None, description="Of an answer; by default the task's own, 256 for most.")
    samples: Annotated[int, Field(ge=1, le=1000)] = Field(1, description="Answers per problem, for pass@k.")
    temperature: Annotated[float, Field(ge=0, le=5)] = Field(0.0, description="0 is greedy.")
    name: TaskLabel | None = Field(None, description="What its results are called; by default as the task.")

    @model_serializer(mode="wrap")
    def _dump_without_silent_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A task that says nothing in younger keys is the task that it was before them: results carry its hash."""
        fields = type(self).model_fields
        younger = ["name", *(key for key in fields if key not in TaskSettings.model_fields)]
        silent = [key for key in younger if getattr(self, key) == fields[key].default]
        return {key: value for key, value in dump(self).items() if key not in silent}

    @model_validator(mode="after")
    def _only_what_the_task_reads(self) -> Self:
        read = task_class(self.task).own_settings
        unread = {}
        for key in type(self).model_fields:
            if key not in TaskSettings.model_fields and key not in read:
                unread[key] = f"is for {listed(_tasks_with(key))}, and this is {self.task}"
        refuse_unread(self, unread)
        return self

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        """Of the sources: some tasks score rows of their own columns, whatever the format."""
        weight = {"weight": "says how often a row is trained on"}
        if self.shots_from is not None:
            refuse_unread(self.shots_from, weight, "shots_from")
        if self.source is not None:
            unread = dict(weight)
            kind = task_class(self.task)
            if kind.own_columns:
                forms = ("format", "prompt", "completion") if self.source.format != kind.row_format else ()
                unread |= dict.fromkeys(forms, f"says how rows are read, and {self.task} has columns of its own")
            refuse_unread(self.source, unread, "source")
        return self

    @model_validator(mode="after")
    def _generates(self) -> Self:
        if not task_class(self.task).generates:
            reason = f"says how answers are generated, and {self.task} compares likelihoods"
            refuse_unread(self, dict.fromkeys(OF_ANSWERS, reason))
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.shots and self.shots_from is None:
            raise ValueError("shots: say in shots_from which file the solved examples come from")
        kind = task_class(self.task)
        if self.shots and not kind.takes_shots:
            raise ValueError(f"shots: {self.task} scores the rows as they are, without solved examples in front")
        if self.shots_from is not None and "shots" not in self.model_fields_set:
            raise ValueError("shots: say how many solved examples to take from shots_from")
        if self.samples > 1 and not kind.takes_samples:
            able = ", ".join(name for name, other in task_classes().items() if other.takes_samples)
            raise ValueError(f"samples: more than one answer per problem is for {able} (pass@k)")
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples: greedy answers are all the same; set temperature, for example 0.8")
        return self


def _tasks_with(key: str) -> list[str]:
    return [name for name, kind in task_classes().items() if key in kind.own_settings]


def _settings_of_tasks() -> dict[str, Any]:
    brought = [kind.own_settings for kind in task_classes().values()]
    return fields_of(brought, _tasks_with)


# As with Adapter: what a task brings along is read by name.
if TYPE_CHECKING:
    Task = TaskSettings
else:
    Task = create_model("Task", __base__=TaskSettings, __module__=__name__, **_settings_of_tasks())


class Eval(Strict):
    tasks: list[Task] = Field([Task(task="nll")])
    batch_size: Positive | None = Field(None, description="Rows at once; by default as many as memory holds.")
    selection: Literal["top", "sample"] = Field("top", description="The top k LoRAs, or drawn as in training.")


def labelled(tasks: list[Task]) -> list[tuple[str, Task]]:
    """By their names; a second task without one of its own is `nll-2` and so on."""
    seen: dict[str, int] = {}
    labels = []
    for task in tasks:
        name = task.name or task.task
        seen[name] = seen.get(name, 0) + 1
        labels.append((name if seen[name] == 1 else f"{name}-{seen[name]}", task))
    return labels


def tasks_while_training(tasks: list[Task]) -> list[tuple[str, Task]]:
    """Those that training may score: programs are not run unasked, and the held-out loss is measured anyway."""
    found = []
    for label, task in labelled(tasks):
        kind = task_class(task.task)
        if not kind.runs_code and (task.source is not None or not kind.any_rows):
            found.append((label, task))
    return found


def measures_while_training(tasks: list[Task]) -> dict[str, "Measure"]:
    """What training measures beside `eval_loss`, by its name there, and may choose the best adapter by."""
    return {
        f"{label}/{measure.name}": measure
        for label, task in tasks_while_training(tasks)
        for measure in task_class(task.task).measures
        if measure.chooses
    }


def cost(metric: str, value: float, tasks: list[Task]) -> float:
    """`value` of `eval_loss` or of a measure of `tasks` such that less is better; its own inverse."""
    measure = measures_while_training(tasks).get(metric)
    return value if measure is None or measure.lower_is_better else -value


class Alarm(Strict):
    """When routing counts as collapsed: docs/routing.md says why these values."""

    ess: Annotated[float, Field(ge=1)] = Field(1.5, description="Effective support of the weights below this.")
    commonest: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="One set serves this share of tokens.")
    dead: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="More than this share of a pool is unused.")
    patience: Positive = Field(10, description="Logged steps in a row before training warns.")


def _refuse(key: str, other: str, why: str = "") -> NoReturn:
    """`train.<key>` cannot be combined with another setting."""
    raise PydanticCustomError(
        "conflict",
        "cannot be combined with {other}{why}; leave one of them out",
        {"other": other, "why": f" ({why})" if why else "", "at": ("train", key)},
    )


class Recipe(Strict):
    """A whole run: what is trained on what, how, and where it is written."""

    model: Model
    adapter: Adapter = Adapter()
    router: Router = Router()
    data: Data
    train: Train = Train()
    eval: Eval = Eval()
    alarm: Alarm = Alarm()
    output_dir: Place
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, values: Any) -> Any:
        return fill_defaults(values)

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        config, router = self.adapter_config(), self.router
        unread = idle_in_router(config.method, config.active == config.pool_size, router)
        unread |= unread_of_router(config.method, router)
        refuse_unread(router, unread, "router", **self.method.router_defaults)
        refuse_unread(self.alarm, self._unread_of_alarm(), "alarm")
        refuse_unread(self.train, self._unread_of_train(), "train")
        return self

    def _unread_of_alarm(self) -> dict[str, str]:
        config = self.adapter_config()
        reason = "watches what a router chooses, and "
        if not config.routed:
            return dict.fromkeys(Alarm.model_fields, f"{reason}adapter.method {config.method} has none")
        if config.active == config.pool_size:
            every = "adapter.active = adapter.pool_size" if "active" in self.method.settings else config.method
            return dict.fromkeys(Alarm.model_fields, f"{reason}under {every} every LoRA is always active")
        return {"ess": "is of the weights of several LoRAs, and adapter.active is 1"} if config.active == 1 else {}

    def _unread_of_train(self) -> dict[str, str]:
        unread = {}
        if {"tensorboard", "dvclive"}.issuperset(self.train.trackers):
            unread["project"] = "names a project of trackers, and train.report_to names none that has projects"
        if self.train.lr_scheduler_type == "constant":
            unread["warmup_ratio"] = "needs a schedule with a warm-up, as train.lr_scheduler_type constant_with_warmup"
        if self.train.early_stopping_patience is None:
            unread["early_stopping_threshold"] = "belongs to train.early_stopping_patience, and there is none"
        pool, method = self.method.pool, self.adapter.method
        if pool is None:
            unread["precondition"] = f"scales gradients of LoRAs of remix's own, and adapter.method {method} has none"
        elif pool.shares_a:
            unread["precondition"] = f"needs an A for each B, and adapter.method {method} has one for all"
        elif pool.residual:
            unread["precondition"] = f"is for LoRAs that stand alone, and adapter.method {method} joins them"
        if not self.adapter.train_loras:
            keys = ("learning_rate", "weight_decay", "max_grad_norm", "precondition")
            unread |= dict.fromkeys(keys, "says how the LoRAs learn, and adapter.train_loras is false")
        if not self.data.holds_out:
            measured = ("eval_steps", "eval_tasks_limit", "per_device_eval_batch_size")
            chosen = ("metric_for_best_model", "early_stopping_patience")
            unread |= dict.fromkeys((*measured, *chosen), f"is of measurements on held-out rows, and {NONE_HELD_OUT}")
        elif not tasks_while_training(self.eval.tasks):
            unread["eval_tasks_limit"] = (
                "is of tasks scored while training, and eval.tasks has none that is: programs are not run then, and "
                "the held-out loss is measured anyway"
            )
        return unread

    @model_serializer(mode="wrap")
    def _dump_what_is_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = dump(self)
        unread = unread_of_router(self.adapter.method, self.router)
        values["router"] = {key: value for key, value in values["router"].items() if key not in unread}
        return values

    @model_validator(mode="after")
    def _estimator_fits(self) -> Self:
        config, router = self.adapter_config(), self.router
        if not config.samples:
            return self
        fewest = 1 if router.lora_gradient == "top" else ESTIMATORS[router.estimator].min_selections
        if router.selections < fewest and router.learning_rate > 0 and not router.fixed:
            raise PydanticCustomError(
                "conflict",
                "M = {m}, but the estimator {estimator} compares selections and needs 2 or more "
                "(or use router.estimator: straight_through, which is biased)",
                {"m": router.selections, "estimator": router.estimator, "at": ("router", "selections")},
            )
        return self

    @model_validator(mode="after")
    def _stops_at_a_measurement(self) -> Self:
        if self.train.early_stopping_patience is not None and self.train.eval_steps is None:
            raise PydanticCustomError(
                "conflict",
                "counts measurements, and without train.eval_steps there are none before the end; set it",
                {"at": ("train", "early_stopping_patience")},
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        """Frozen LoRAs must be some that do something, and leave a router that learns."""
        adapter, router = self.adapter, self.router
        if adapter.train_loras:
            return self
        problem = None
        if adapter.init_from is None:
            problem = "false keeps the LoRAs as they begin, which is at nothing; say with adapter.init_from at which"
        elif router.fixed or router.learning_rate == 0 or not self.adapter_config().samples:
            problem = "false leaves nothing to train: no choice of this router is learnt"
        if problem:
            raise PydanticCustomError("conflict", problem, {"at": ("adapter", "train_loras")})
        return self

    @model_validator(mode="after")
    def _graphs_fit(self) -> Self:
        """A recorded step cannot draw dropout masks, change its loss scale, restore random states or make a mask."""
        train = self.train
        other = {
            "adapter.dropout": self.adapter.dropout > 0,
            "model.dtype: float16": self.model.dtype == "float16",
            "train.gradient_checkpointing": train.gradient_checkpointing,
            "train.shard_base": train.shard_base,
            "model.quantization": self.model.quantization != "none",
            "model.attn_implementation: eager": self.model.attn_implementation == "eager",
            "train.tokens_per_batch": train.tokens_per_batch is not None,  # few batches would have the shape of another
        }
        for name, used in other.items():
            if train.cuda_graphs and used:
                _refuse("cuda_graphs", name)
        return self

    @model_validator(mode="after")
    def _sharding_fits(self) -> Self:
        """Answers end at different steps on different processes, which could then not gather layers together."""
        if self.train.shard_base:
            if self.train.eval_tasks_limit is not None:
                _refuse("shard_base", "train.eval_tasks_limit")
            if self.model.quantization == "8bit":
                _refuse("shard_base", "model.quantization: 8bit", "4bit can be")
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        for key, why in self.method.not_with.items():
            if getattr(self.train, key):
                _refuse(key, f"adapter.method: {self.adapter.method}", why)
        return self

    @model_validator(mode="after")
    def _selection_fits(self) -> Self:
        if self.eval.selection == "sample" and not self.adapter_config().samples:
            where = {"at": ("eval", "selection")}
            raise PydanticCustomError("conflict", "nothing is sampled by this adapter; use top", where)
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        metric = self.train.metric_for_best_model
        known = list(measures_while_training(self.eval.tasks))
        if metric != "eval_loss" and (metric not in known or self.train.eval_tasks_limit is None):
            fix = "set train.eval_tasks_limit" if metric in known else f"use {', '.join(['eval_loss', *known])}"
            raise PydanticCustomError(
                "conflict",
                "{metric} is not measured during training; {fix}",
                {"metric": metric, "fix": fix, "at": ("train", "metric_for_best_model")},
            )
        return self

    def with_dtype_of(self, begun: "Recipe") -> "Recipe":
        """A resumed run computes as it was begun, also on another machine, unless its recipe says otherwise."""
        if "dtype" in self.model.model_fields_set:
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"dtype": begun.model.dtype})})

    def with_date(self, day: str | None) -> "Recipe":
        """With the day that the chat template takes for today, unless the recipe says one."""
        if day is None or self.data.template_date is not None:
            return self
        return self.model_copy(update={"data": self.data.model_copy(update={"template_date": day})})

    @property
    def method(self) -> "Method":
        return method_named(self.adapter.method)

    @property
    def virtual_tokens(self) -> int:
        """That the method puts in front of every sequence."""
        return self.adapter_config().virtual_tokens if self.method.in_front else 0

    def adapter_config(self) -> AdapterConfig:
        """In full; methods without a pool are one adapter that is always on."""
        method, router = self.method, self.router
        read = {key: getattr(self.adapter, key) for key in method.settings if key not in OF_THE_BEGINNING}
        values: dict[str, Any] = {"pool_size": 1} | {key: read[key] for key in read if key in CONFIG_FIELDS}
        values.setdefault("active", values["pool_size"])
        if "target_modules" in values:
            values["target_modules"] = tuple(values["target_modules"])
        return AdapterConfig(
            method=self.adapter.method,
            pool=method.pool,
            scope=router.scope if "scope" in method.router_settings else "block",
            level=router.level,
            router_init_std=router.init_std,
            router_unit_input=router.unit_input,
            clusters=router.clusters if router.level == "sequence" else 0,
            settings={key: read[key] for key in read if key not in CONFIG_FIELDS},
            **(values | method.constants),
        )
