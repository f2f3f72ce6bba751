"""Tables from the keys of Axolotl, LLaMA-Factory, TRL and PEFT to tunekit's keys: TOP_LEVEL for keys outside sections,
IN_ADAPTER for keys of the section `adapter`."""

from tunekit.recipe.foreign import values as values
from tunekit.recipe.foreign.alias import Alias, dropped, nowhere, same_names, to
from tunekit.recipe.foreign.samples import OF_SAMPLES
from tunekit.recipe.foreign.values import NOTHING, NotExact, exactly, lost, one_of, same, switch, these
from tunekit.recipe.reading.draft import KeyPath
from tunekit.recipe.reading.names import known_names
from tunekit.recipe.training import SCHEDULERS

_SCHEDULERS = one_of(
    {**{name: name for name in SCHEDULERS}, "constant_with_warmup": "constant"}, "write training.scheduler"
)
_OPTIMIZERS = one_of(
    {
        **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused"), "adamw"),
        **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
        **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw"),
        "paged_adamw_8bit": "paged_adamw_8bit",
        "adafactor": "adafactor",
        **dict.fromkeys(("lion", "lion_32bit"), "lion"),
        "muon": "muon",
    },
    "write training.optimizer",
)
_BETAS = "tunekit's AdamW has the betas 0.9 and 0.999, and the epsilon 1e-8; remove the key"
_ROPE = "an adapter's folder cannot say that its base needs a different rope, so programs that serve it would compute"
_ROPE += " something else"
_SWITCH = these(True, False)
_ATTENTION = one_of({"auto": "auto", "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"})
_STRATEGY = one_of({"steps": NOTHING, "epoch": NOTHING, "no": NOTHING, "best": NOTHING, False: NOTHING})
_EXCESS = {"drop": "drop", "truncate": "truncate", "raise": "error"}
_SHARDED = "memory.sharding: full divides the base among the ranks of a run"
_UPLOADED = "tunekit uploads nothing; use `hf upload` with the finished folder"
_TOKENS = "rows end with the end token of the base's tokenizer; the chat template defines the end of chat turns"
PRECISION_KEYS = ("bf16", "fp16")
SOURCE_KEYS = {"max_samples": "max_rows", "dataset_train_split": "split", "dataset_text_field": "columns"}
TEMPLATE_KEYS = ("template", "chat_template")
TEMPLATES = {  # beginning of a template's name: words in the names of bases with this template
    **{name: (name,) for name in ("llama", "qwen", "gemma", "mistral", "phi", "deepseek", "falcon", "glm", "granite")},
    "chatml": ("qwen", "smollm", "yi-"),
    "command": ("command", "aya"),
}

TOP_LEVEL: dict[str, Alias] = {
    **to("model.name_or_path", "base_model", "model_name_or_path", "model_name"),
    **to("model.revision", "model_revision", "revision_of_model"),
    **to("model.trust_remote_code", "trust_remote_code"),
    **to("model.dtype", "torch_dtype", "dtype", by=these("auto", "bfloat16", "float16", "float32")),
    **to("training.router_loss", "moe_aux_loss_coef", "router_aux_loss_coef"),
    **to("model.attention", "attn_implementation"),
    **to("model.attention", "flash_attention", by=switch("flash_attention_2")),
    **to("model.attention", "sdp_attention", by=switch("sdpa")),
    **to("model.attention", "eager_attention", by=switch("eager")),
    **to("model.attention", "flash_attn", by=_ATTENTION),
    **to("model.double_quantization", "double_quantization", "use_bnb_nested_quant", "bnb_4bit_use_double_quant"),
    # rewrite.py reads the keys of the next three lines together, because other tools use several keys for one setting.
    **to("model.quantization", "load_in_4bit", "load_in_8bit", "quantization_bit"),
    **to("model.quantization", "bnb_4bit_quant_type", "quantization_type"),
    **to("model.dtype", *PRECISION_KEYS),
    **to("memory.gradient_checkpointing", "gradient_checkpointing", by=_SWITCH),
    **dropped("recomputation is always non-reentrant", "gradient_checkpointing_kwargs"),
    **to("data.train", "datasets", by=values.dataset_list),
    **to("data.train", "dataset", by=values.dataset_files),
    **to("data.train", "dataset_name"),
    **to("data.eval", "test_datasets", by=values.dataset_list),
    **to("data.eval", "eval_dataset", by=values.dataset_files),
    **to("data.eval", "val_set_size", "val_size", by=values.evaluation_share),
    **to("data.max_length", "sequence_len", "cutoff_len", "max_seq_length", "max_length"),
    **to("data.packing", "sample_packing", "packing", by=_SWITCH),
    **to("data.packing", "neat_packing", by=switch(True)),
    **to("data.train_on", "train_on_inputs", "train_on_prompt", by=one_of({False: "assistant", True: "all"})),
    **to("data.train_on", "mask_history", by=switch("last")),
    **to("data.train_on", "completion_only_loss", by=one_of({True: "assistant", False: "all"})),
    **to("data.train_on", "assistant_only_loss", by=one_of({True: "assistant", False: NOTHING})),
    **to("data.chat_template", "chat_template_path", *TEMPLATE_KEYS),  # rewrite.py handles the last two
    **{name: Alias(("data", "train", 0, field), same) for name, field in SOURCE_KEYS.items()},  # rewrite.py
    **to("data.shuffle", "train_sampling_strategy", by=one_of({"random": True, "sequential": False})),
    **dropped("Axolotl's trainer shuffles the rows of each epoch in any case", "shuffle_merged_datasets"),
    **to("data.shuffle", "curriculum_sampling", by=one_of({True: False, False: NOTHING})),
    **to("data.excess_length", "excess_length_strategy", by=one_of(_EXCESS)),
    **to("data.shuffle", "disable_shuffling", by=values.negated),
    **to("adapter.method", "finetuning_type"),
    **nowhere(exactly(True, how="write adapter: {method: ...}"), "use_peft"),
    **to("adapter.r", "lora_r", "lora_rank"),
    **to("adapter.alpha", "lora_alpha"),
    **to("adapter.dropout", "lora_dropout"),
    **to("adapter.target_modules", "lora_target_modules"),
    **to("adapter.target_modules", "lora_target", by=values.lora_targets),
    **to("adapter.target_modules", "lora_target_linear", by=switch("all-linear")),
    **to("adapter.use_rslora", "use_rslora", "peft_use_rslora"),
    **to("adapter.init_from", "lora_model_dir", "adapter_name_or_path"),
    **to("adapter.modules_to_save", "lora_modules_to_save"),
    **nowhere(lost("in tunekit, DoRA is a separate method", "write adapter.method: dora"), "use_dora", "peft_use_dora"),
    **to("objective.method", "stage", by=values.stage),
    **to("objective.method", "rl", by=these(*known_names("objectives"))),
    **to("objective.beta", "beta", "rl_beta", "pref_beta"),
    **to("objective.loss_type", "loss_type"),
    **to("objective.loss_type", "pref_loss", by=these("sigmoid", "hinge", "ipo")),
    **to("objective.label_smoothing", "label_smoothing", "dpo_label_smoothing"),
    **same_names("objective", "loss_weights", "rpo_alpha", "ld_alpha", "simpo_gamma", "cpo_alpha", "discopop_tau"),
    **to("objective.desirable_weight", "desirable_weight", "kto_desirable_weight", "kto_chosen_weight"),
    **to("objective.undesirable_weight", "undesirable_weight", "kto_undesirable_weight", "kto_rejected_weight"),
    **to("objective.center_rewards_coefficient", "center_rewards_coefficient"),
    **nowhere(
        lost("pref_ftx is a mean for each answer", "write objective.rpo_alpha, which is a mean over the step"),
        "pref_ftx",
    ),
    **OF_SAMPLES,
    **to("objective.precompute_ref_log_probs", "precompute_ref_log_probs"),
    **nowhere(exactly("reverse_kl"), "f_divergence_type"),
    **nowhere(lost("tunekit does not weight pairs"), "use_weighting"),
    **nowhere(lost("the reference model is always the model at step 0"), "sync_ref_model"),
    **to("training.epochs", "num_epochs", "num_train_epochs"),
    **to("training.max_steps", "max_steps", by=values.unset_by_negative),
    **to("training.micro_batch_size", "micro_batch_size", "per_device_train_batch_size"),
    **same_names("training", "gradient_accumulation_steps", "learning_rate"),
    **to("training.scheduler", "lr_scheduler", "lr_scheduler_type", by=_SCHEDULERS),
    **to("training.scheduler_settings", "lr_scheduler_kwargs", by=values.mapping_text),
    **nowhere(exactly(0.9, how=_BETAS), "adam_beta1"),
    **nowhere(exactly(0.999, how=_BETAS), "adam_beta2"),
    **nowhere(exactly(1e-8, how=_BETAS), "adam_epsilon"),
    **nowhere(exactly(0.0, 0), "label_smoothing_factor"),
    **same_names("training", "warmup_steps", "warmup_ratio"),
    **to("training.optimizer", "optimizer", "optim", by=_OPTIMIZERS),
    **to("training.weight_decay", "weight_decay"),
    **to("training.max_grad_norm", "max_grad_norm", by=values.turned_off_by_zero),
    **to("training.loraplus_ratio", "loraplus_lr_ratio"),
    **same_names("training", "seed", "save_steps"),
    **to("training.keep_checkpoints", "save_total_limit"),
    **to("training.eval_steps", "eval_steps"),
    **nowhere(_STRATEGY, "save_strategy", "eval_strategy"),  # epoch: rewrite.py
    **nowhere(exactly(True, how="run `tunekit train`"), "do_train"),
    **to("evaluation.batch_size", "per_device_eval_batch_size", "eval_batch_size"),
    **to("evaluation.patience", "early_stopping_patience"),
    **to("evaluation.best", "metric_for_best_model", by=values.best_metric),
    **to("evaluation.generate", "predict_with_generate"),
    **to("evaluation.max_new_tokens", "max_new_tokens"),
    **to("output.dir", "output_dir"),
    **to("output.report_to", "report_to", by=values.trackers),
    **to("output.report_to", "use_tensorboard", by=switch(["tensorboard"])),
    **dropped("every step is logged", "logging_steps", "logging_first_step", "logging_strategy", "log_level"),
    **dropped("every step is logged", "include_num_input_tokens_seen", "plot_loss", "include_tokens_per_second"),
    **dropped("every step is logged", "include_effective_tokens_per_second", "log_level_replica", "disable_tqdm"),
    **dropped(
        "rows are cached by their content", "dataset_prepared_path", "overwrite_cache", "dataset_num_proc", "cache_dir"
    ),
    **dropped("rows are cached by their content", "preprocessing_num_workers", "dataset_processes"),
    **dropped("rows are ready before training begins", "dataloader_num_workers", "dataloader_pin_memory"),
    **dropped("rows are ready before training begins", "dataloader_prefetch_factor", "remove_unused_columns"),
    **dropped("rows are ready before training begins", "dataloader_persistent_workers"),
    **dropped("rows are ready before training begins", "data_shared_file_system", "tokenized_path"),
    **dropped("every step has the mean over all its tokens", "average_tokens_across_devices"),
    **dropped("recomputation is always non-reentrant", "use_reentrant_gc", "upcast_layernorm"),
    **dropped("with report_to: [wandb], the environment's WANDB_PROJECT is used", "wandb_project"),
    **dropped("with report_to: [wandb], wandb reads its other settings from the environment", "wandb_entity"),
    **dropped("with report_to: [wandb], wandb reads its other settings from the environment", "wandb_mode"),
    **dropped("a tracker's run has the name of the run folder", "wandb_name", "wandb_run_id", "run_name"),
    **dropped("no gradients and no weights are uploaded", "wandb_watch", "wandb_log_model"),
    **dropped("metrics.jsonl contains all metrics", "trackio_space_id", "trackio_project_name", "trackio_run_name"),
    **dropped("the run folder contains all files of the run", "logging_dir"),
    **dropped("padding changes no result", "pad_to_sequence_len", "pad_to_multiple_of"),
    **dropped("sequences are concatenated without padding", "group_by_length", "length_column_name", "padding_free"),
    **dropped("this setting changes no result", "strict", "local_rank", "debug", "ddp_timeout", "use_cache"),
    **dropped("checkpoints are safetensors", "save_safetensors", "save_only_model"),
    **dropped("use `tunekit train --overwrite`", "overwrite_output_dir"),
    **dropped("tunekit does not turn on TF32", "tf32"),
    **dropped("gradients are summed without DistributedDataParallel", "ddp_find_unused_parameters"),
    **dropped("the fast tokenizer is always used", "use_fast_tokenizer"),
    **nowhere(
        lost(
            "a DeepSpeed file can set an optimizer and a precision", "write training.optimizer and model.dtype instead"
        ),
        "deepspeed",
    ),
    **dropped(_SHARDED, "fsdp", "fsdp_config", "fsdp_version", "fsdp_transformer_layer_cls_to_wrap"),
    **nowhere(lost("tunekit does not train models that read images and write text"), "processor_type"),
    **nowhere(lost("tunekit always prepares rows"), "skip_prepare_dataset"),
    **nowhere(lost("tunekit trains only whole modules", "write adapter"), "unfrozen_parameters"),
    **nowhere(same, "evals_per_epoch", "saves_per_epoch", "dataset_dir"),  # rewrite.py, datasets.py
    **nowhere(same, "pissa_init", "pissa_iter"),  # rewrite.py
    **dropped("run `tunekit adapter convert` on the result", "pissa_convert"),
    **nowhere(values.tokens_of_padding, "special_tokens"),
    **nowhere(
        lost(_TOKENS, "remove the key if its token is the same; otherwise set eos_token in the base's files"),
        "eos_token",
    ),
    **nowhere(same, "dataset_test_split"),  # rewrite.py
    **nowhere(exactly("default", how="write the source under data.train"), "dataset_config"),
    **nowhere(exactly("keep_start"), "truncation_mode"),
    **nowhere(exactly("bfd", how="write data.excess_length: split"), "packing_strategy"),
    **nowhere(exactly("CAUSAL_LM", how="write objective"), "lora_task_type"),
    **to("memory.activation_offload", "activation_offloading", by=switch(True)),
    **dropped("tunekit does not compile layers", "torch_compile"),
    **to("adapter.target_parameters", "lora_target_parameters"),
    **nowhere(values.plugins, "plugins"),
    **dropped(
        "kernels change no result, and training.kernels chooses them",
        *("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_swiglu", "liger_glu_activation"),
        *("use_liger_kernel", "enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "unsloth_lora_mlp"),
        *("flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_mlp", "flash_attn_fuse_qkv"),
    ),
    **to("adapter.modules_to_save", "additional_target", by=values.lora_targets),
    **to("memory.gradient_checkpointing", "disable_gradient_checkpointing", by=values.negated),
    **nowhere(
        lost(_ROPE, "write rope_parameters in config.json of a copy of the base, and train that"), "rope_scaling"
    ),
    **dropped(
        "logits are computed in chunks", "liger_fused_linear_cross_entropy", "liger_cross_entropy", "cut_cross_entropy"
    ),
    **dropped("tunekit always fuses the products of LoRA", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"),
    **nowhere(exactly("bnb", "bitsandbytes"), "quantization_method"),
    **nowhere(values.model_class, "model_type"),
    **nowhere(exactly("concat", how="write weight: under each source"), "mix_strategy"),
    **nowhere(lost("tunekit has no shifted attention", "remove it"), "s2_attention"),
    **nowhere(lost("tunekit does not use xformers"), "xformers_attention"),
    **to("evaluation.max_new_tokens", "eval_max_new_tokens"),
    **dropped("the tokenizer's own class is used", "tokenizer_type"),
    **dropped("rows of an evaluation are never packed", "eval_sample_packing"),
    **dropped("if the loss rises, a warning names the rows", "loss_watchdog_threshold", "loss_watchdog_patience"),
    **dropped("no table of answers is uploaded", "eval_table_size"),
    **dropped("the kind of layer determines this setting", "lora_fan_in_fan_out"),
    **nowhere(lost("tunekit adds no noise to embeddings"), "neftune_noise_alpha"),
    **dropped(_UPLOADED, "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push"),
    **dropped("the environment's HF_TOKEN is used", "hub_token"),
    **dropped("the metric determines this setting", "greater_is_better"),
    **to("evaluation.best", "load_best_model_at_end", by=switch("eval.loss")),
    **nowhere(exactly(True, False), "do_eval"),
    **nowhere(lost("--resume is an option of the command", "run `tunekit train --resume`"), "resume_from_checkpoint"),
}
IN_ADAPTER: dict[str, Alias] = {
    **to("adapter.method", "peft_type", by=one_of({"LORA": "lora"})),
    **to("adapter.alpha", "lora_alpha"),
    **to("adapter.dropout", "lora_dropout"),
    **nowhere(exactly("CAUSAL_LM"), "task_type"),
    **nowhere(exactly(True, how="write adapter.start"), "init_lora_weights"),
    **dropped("the kind of layer determines this setting", "fan_in_fan_out"),
    **nowhere(exactly(False), "inference_mode"),
    "use_dora": TOP_LEVEL["use_dora"],
}


def alias_target(name: str) -> KeyPath | None:
    """tunekit's key for another tool's name; None if the name is unknown or tunekit has no such key."""
    alias = TOP_LEVEL.get(name) or IN_ADAPTER.get(name)
    return alias.target if alias else None


def meaning(name: str, value: object) -> tuple[KeyPath, object] | None:
    """tunekit's key and value for another tool's name and value; None if there is no exact translation."""
    if name in ("load_in_4bit", "load_in_8bit", "quantization_bit"):
        return (("model", "quantization"), "int8" if value == 8 or "8bit" in name else "nf4") if value else None
    alias = TOP_LEVEL.get(name) or IN_ADAPTER.get(name)
    if alias is None or alias.target is None or name in (*PRECISION_KEYS, *TEMPLATE_KEYS, *SOURCE_KEYS):
        return None
    try:
        ours = alias.translate(value)
    except NotExact:
        return None
    return None if ours is NOTHING else (alias.target, ours)


def is_alias(key: KeyPath) -> bool:
    """Whether a key is another tool's name."""
    if len(key) == 2 and key[0] == "adapter":
        return key[1] in IN_ADAPTER
    return len(key) == 1 and key[0] in TOP_LEVEL
