"""Train a routed adapter with axolotl: a plug-in for its YAML files. Needs axolotl, which nothing else here does.

    plugins: [remix_cli.integrations.axolotl.RemixPlugin]
    adapter: remix
    remix: {adapter: {pool_size: 8, active: 4, rank: 8}, router: {learning_rate: 0.3}}

In axolotl's order: it reads the YAML (RemixArgs), builds the model, lets the plug-in put the adapter on it
(load_adapter; embeddings are resized and types converted by then), makes a trainer of the plug-in's class, trains, and
calls `save_pretrained` of what load_adapter returned. What RemixTrainer does not do is refused when the YAML is read.
"""

from dataclasses import fields
from typing import Any, Self

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from remix_cli.core.config import AdapterConfig
from remix_cli.integrations.model import RemixModel, get_remix_model
from remix_cli.integrations.trainer import RemixTrainer, RouterTraining

ADAPTER = "remix"  # the value of axolotl's key `adapter`
ADAPTER_ALONE = "leave it out; nothing but the adapter is trained"
ONE_LOSS = "leave it out; the loss is cross-entropy"
SHARDED_ELSEWHERE = "leave it out, or use `remix train` with train.shard_base"
IN_BITS = "give overrides_of_model_kwargs.quantization_config; axolotl reads this for its own adapters only"
CHECKPOINTING = "leave it out; gradient_checkpointing: true works"
KEYS = {  # axolotl's key: what to do instead
    "lora_r": "give remix.adapter.rank",
    "lora_alpha": "give remix.adapter.omega, the weight of an active LoRA",
    "lora_dropout": "give remix.adapter.dropout",
    "lora_target_modules": "give remix.adapter.target_modules",
    "lora_target_linear": "give remix.adapter.target_modules: [all-linear]",
    "lora_modules_to_save": ADAPTER_ALONE,
    "peft_use_dora": "leave it out",
    "peft_use_rslora": "give remix.adapter.omega: rslora",
    "loraplus_lr_ratio": "leave it out; A and B have one rate",
    "load_in_4bit": IN_BITS,
    "load_in_8bit": IN_BITS,
    "rl": ONE_LOSS,
    "reward_model": ONE_LOSS,
    "process_reward_model": ONE_LOSS,
    "use_eaft": ONE_LOSS,
    "orpo_alpha": ONE_LOSS,
    "fsdp": SHARDED_ELSEWHERE,
    "fsdp_config": SHARDED_ELSEWHERE,
    "deepspeed": SHARDED_ELSEWHERE,
    "activation_offloading": CHECKPOINTING,
    "layer_offloading": CHECKPOINTING,
    "selective_checkpointing": CHECKPOINTING,
    "unfrozen_parameters": ADAPTER_ALONE,
    "lisa_step_interval": ADAPTER_ALONE,
    "fix_untrained_tokens": ADAPTER_ALONE,
    "embedding_lr": ADAPTER_ALONE,
    "embedding_lr_scale": ADAPTER_ALONE,
    "lr_groups": "give learning_rate and remix.router.learning_rate",
    "neftune_noise_alpha": "leave it out; it would differ between the passes that the router's gradient compares",
    "merge_lora": "leave it out; a routed adapter is no one matrix",
}
WHOLE_MODEL_OPTIMIZERS = ("muon", "dion", "sinkgd", "polora")  # made of a model and not of parameter groups
SPREADS_ONE_MODEL = ("context_parallel_size", "tensor_parallel_size", "expert_parallel_size")
NOT_OF_POOLS = ("virtual_tokens", "vectors", "vector_length", "pool", "settings")  # of AdapterConfig's fields


def _keys(name: str, kind: Any, without: tuple[str, ...] = ()) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass; what they may be together, the dataclass says itself."""
    found: dict[str, Any] = {own.name: (own.type, own.default) for own in fields(kind) if own.name not in without}
    return create_model(name, __config__=ConfigDict(extra="forbid"), **found)


AdapterKeys = _keys("AdapterKeys", AdapterConfig, NOT_OF_POOLS)
RouterKeys = _keys("RouterKeys", RouterTraining)


class RemixSettings(BaseModel):
    """The group `remix`: the fields of AdapterConfig, and of RouterTraining; without `router` none is trained."""

    model_config = ConfigDict(extra="forbid")
    adapter: AdapterKeys = Field(default_factory=AdapterKeys)  # type: ignore[valid-type]
    router: RouterKeys | None = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.adapter_config()
        return self

    def adapter_config(self) -> AdapterConfig:
        """Raises ValueError for values that do not fit together."""
        return AdapterConfig(**dict(self.adapter))

    def router_training(self) -> RouterTraining | None:
        """None where the YAML has no such group: what the trainer does then, it says itself."""
        return None if self.router is None else RouterTraining(**dict(self.router))


class RemixArgs(BaseModel):
    """What axolotl adds to the keys of its YAML."""

    remix: RemixSettings = Field(default_factory=RemixSettings)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_ignored(cls, given: Any) -> Any:
        """Of all keys of the YAML. Raises ValueError, with every problem, for what the trainer would not do."""
        problems = list(_problems(given))
        if problems:
            raise ValueError("; ".join(problems))
        return given


def _problems(given: dict[str, Any]) -> list[str]:
    if given.get("adapter") != ADAPTER:
        return [f"adapter: set it to {ADAPTER}, or take RemixPlugin out of plugins"]
    found = [f"{key}: not with adapter {ADAPTER}; {instead}" for key, instead in KEYS.items() if given.get(key)]
    if str(given.get("optimizer")) in WHOLE_MODEL_OPTIMIZERS:
        found.append(f"optimizer: {given['optimizer']} not with adapter {ADAPTER}; use adamw_torch")
    for key in SPREADS_ONE_MODEL:
        if (given.get(key) or 1) > 1:
            found.append(f"{key}: not with adapter {ADAPTER}; leave it at 1")
    return found


def _settings(cfg: Any) -> RemixSettings:
    """Of axolotl's configuration, which holds what RemixArgs checked as plain values, without those that are None."""
    return RemixSettings.model_validate(dict(cfg.remix or {}))


class RemixPlugin(BasePlugin):
    """Everything axolotl asks of it; `cfg` is axolotl's whole configuration, None where a key is absent."""

    tokenizer: Any = None  # of the trainer, once there is one

    def get_input_args(self) -> str:
        return f"{__name__}.{RemixArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """axolotl averages a step's loss by process; the gradients here are of its tokens, whichever process has
        them."""
        return {"average_tokens_across_devices": True}

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[RemixModel, None]:
        """A new adapter on `model`, or that of `lora_model_dir`.

        Raises ArtefactError for the adapter of another base model, TargetError if a target matches nothing, ValueError
        if `lora_model_dir` holds another adapter than the YAML describes.
        """
        model.disable_input_require_grads()  # axolotl turns them on; the LoRAs need no gradients of embeddings
        config = _settings(cfg).adapter_config()
        if not cfg.lora_model_dir:
            return get_remix_model(model, config, seed=cfg.seed or 0), None
        loaded = RemixModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        if loaded.adapter.config != config:
            raise ValueError(f"remix.adapter: not what {cfg.lora_model_dir} holds; give its {loaded.adapter.config}")
        return loaded, None

    def get_trainer_cls(self, cfg: Any) -> type[RemixTrainer]:
        """axolotl's own trainer, with our steps; axolotl calls it without knowing of `router`."""
        from axolotl.core.trainers import AxolotlTrainer

        router = _settings(cfg).router_training()

        class AxolotlRemixTrainer(RemixTrainer, AxolotlTrainer):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, router=router, **kwargs)

        return AxolotlRemixTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.tokenizer = trainer.processing_class

    def post_train(self, cfg: Any, model: Any) -> None:
        """Write the adapter again, with the tokenizer's identity, which axolotl's call of save_pretrained leaves out.

        axolotl calls this twice: with the trainer's model, and after it has saved with what load_adapter returned.
        """
        if isinstance(model, RemixModel) and cfg.local_rank == 0:
            model.save_pretrained(cfg.output_dir, tokenizer=self.tokenizer)
