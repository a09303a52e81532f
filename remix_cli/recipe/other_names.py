"""Keys of other tools (PEFT, transformers, TRL, axolotl, LLaMA-Factory, unsloth): what does the same here, or why
nothing does. Only a recipe that holds one of them reads this, for the line that refuses it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Here:
    """`key`: the key that does it, perhaps with the value to give it. `note`: what is different about it."""

    key: str
    note: str = ""

    def __str__(self) -> str:
        return f"here it is {self.key}{f', {self.note}' if self.note else ''}"


def _each(names: str, answer: Here | str) -> dict[str, Here | str]:
    return dict.fromkeys(names.split(), answer)


RANK = Here("adapter.rank", "of each LoRA in the pool")
WEIGHT = Here("adapter.omega", "the weight of an active LoRA: 2/sqrt(k r), or 2/(k r)")
ROWS = Here("data.train", "a list of sources")

# A text is the whole answer, where no key does it.
ANSWERS: dict[str, Here | str] = (
    # the model
    _each("base_model model_name model_name_or_path pretrained_model_name_or_path", Here("model.name_or_path"))
    | _each("load_in_4bit", Here("model.quantization: 4bit"))
    | _each("load_in_8bit", Here("model.quantization: 8bit"))
    | _each("quantization_bit quantization_config", Here("model.quantization", "none, 8bit or 4bit"))
    | _each("bnb_4bit_quant_type bnb_4bit_use_double_quant", "4 bits are always NF4 with double quantisation")
    | _each("bnb_4bit_compute_dtype", Here("model.dtype", "also with 4 bits"))
    | _each("bf16 pure_bf16", Here("model.dtype: bfloat16"))
    | _each("fp16", Here("model.dtype: float16"))
    | _each("torch_dtype precision", Here("model.dtype"))
    | _each("flash_attention flash_attn", Here("model.attn_implementation: flash_attention_2"))
    | _each("sdp_attention", Here("model.attn_implementation: sdpa"))
    | _each("eager_attention", Here("model.attn_implementation: eager"))
    | _each(
        "tokenizer tokenizer_name tokenizer_type model_type tokenizer_name_or_path",
        "model and tokenizer come from model.name_or_path",
    )
    # the adapter
    | _each("r lora_r lora_rank", RANK)
    | _each("lora_alpha alpha", WEIGHT)
    | _each("use_rslora", Here("adapter.omega: rslora"))
    | _each("use_dora", Here("adapter.method: dora"))
    | _each("peft_type finetuning_type adapter_type task_type", Here("adapter.method"))
    | _each("lora_dropout", Here("adapter.dropout"))
    | _each("lora_target_modules lora_target", Here("adapter.target_modules"))
    | _each("lora_target_linear", Here("adapter.target_modules: all-linear"))
    | _each("num_experts n_experts num_loras experts num_local_experts", Here("adapter.pool_size"))
    | _each("top_k num_experts_per_tok topk experts_per_token", Here("adapter.active"))
    | _each("modules_to_save lora_modules_to_save", "nothing but the adapter is trained, whole modules never")
    | _each("init_lora_weights", "A is random and B is zero at the start")
    | _each("bias", "biases are frozen")
    # the router
    | _each("num_train_samples num_samples n_samples", Here("router.selections", "M"))
    | _each("router_aux_loss_coef aux_loss_coef load_balancing_loss_coef", Here("router.balance"))
    | _each("router_lr router_learning_rate", Here("router.learning_rate"))
    # the data
    | _each("dataset datasets dataset_name train_file train_dataset dataset_path", ROWS)
    | _each("eval_dataset test_datasets validation_file val_dataset", Here("data.validation", "a list of sources"))
    | _each("val_set_size val_size test_size", Here("data.validation_fraction"))
    | _each("max_seq_length max_seq_len sequence_len cutoff_len model_max_length seq_length", Here("data.max_length"))
    | _each(
        "packing sample_packing neat_packing pad_to_sequence_len",
        "there is no packing: train.group_by_length fills batches with rows of like length, a few in a hundred tokens "
        "are padding, and validate says how many",
    )
    | _each(
        "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss mask_prompt",
        "only the assistant's turns are learnt; data.train.learn says which of them",
    )
    | _each("dataset_text_field text_column", Here("data.train.format: text", "with columns, if it has another name"))
    | _each("template chat_template", "the tokenizer's own is used; data.use_chat_template: false turns it off")
    | _each("max_samples max_train_samples", Here("data.train.limit"))
    | _each(
        "dataset_prepared_path preprocessing_num_workers dataset_num_proc dataloader_num_workers",
        "rows are tokenised before the first step; many are kept on disk for the next run (REMIX_CACHE says where)",
    )
    # training
    | _each("num_epochs epochs", Here("train.num_train_epochs"))
    | _each("lr", Here("train.learning_rate"))
    | _each("micro_batch_size train_batch_size batch_size", Here("train.per_device_train_batch_size"))
    | _each("eval_batch_size", Here("train.per_device_eval_batch_size"))
    | _each("gradient_accumulation grad_accum", Here("train.gradient_accumulation_steps"))
    | _each("lr_scheduler lr_schedule", Here("train.lr_scheduler_type"))
    | _each("warmup_steps", Here("train.warmup_ratio", "a share of all steps"))
    | _each("gradient_clipping max_norm grad_clip", Here("train.max_grad_norm"))
    | _each(
        "optim optimizer adam_beta1 adam_beta2 adam_epsilon",
        "the optimizer is always AdamW with betas 0.9 and 0.999 in float32, for adapters are small",
    )
    | _each("use_reentrant gradient_checkpointing_kwargs", Here("train.gradient_checkpointing"))
    | _each("fsdp fsdp_config fsdp_version", Here("train.shard_base"))
    | _each("deepspeed", "DeepSpeed is not used; train.shard_base shares the base model out over the GPUs")
    | _each("local_rank ddp_find_unused_parameters", "several processes: accelerate launch -m remix_cli train RECIPE")
    | _each("eval_strategy evaluation_strategy evals_per_epoch", Here("train.eval_steps"))
    | _each("save_strategy saves_per_epoch", Here("train.save_steps"))
    | _each("load_best_model_at_end", "the best adapter is always kept, in best/ beside the last one")
    | _each("resume_from_checkpoint", "remix train RECIPE --resume goes on from the newest checkpoint")
    | _each("overwrite_output_dir", "remix train RECIPE --overwrite")
    | _each("use_wandb wandb_mode", Here("train.report_to: wandb"))
    | _each("wandb_project project_name mlflow_experiment_name trackio_project", Here("train.project"))
    | _each("logging_dir run_name wandb_name wandb_run_id", "a tracked run is named after output_dir")
    | _each("push_to_hub hub_model_id", "remix export RUN --push-to-hub OWNER/NAME, once it is trained")
    | _each("neftune_noise_alpha", "there is no noise on the embeddings; adapter.dropout is the only one")
)
