"""The key names of Axolotl, LLaMA-Factory, TRL and PEFT, where those tools put them, and tunekit's key for each.

Comes in: nothing.  Goes out: `TOP_LEVEL` (flat files) and `IN_ADAPTER` (PEFT's names).
"""

from __future__ import annotations

from dataclasses import dataclass

from tunekit.recipe.foreign import values as values
from tunekit.recipe.foreign.values import NotExact, Translate, always_so, lost, one_of, same
from tunekit.recipe.reading.draft import KeyPath
from tunekit.recipe.training import SCHEDULERS


@dataclass(frozen=True)
class Alias:
    """Where a foreign key goes and how its value is translated; no target: it never writes anything."""

    target: KeyPath | None
    translate: Translate = same
    why: str = "it changes nothing here"  # a value that says nothing says nothing


def _dropped(why: str) -> Alias:
    """A key of which no result depends, whatever its value."""
    return Alias(None, always_so, why)


def _to(dotted_key: str, translate: Translate = same) -> Alias:
    return Alias(tuple(dotted_key.split(".")), translate)


_NOTHING = values.NOTHING
_SCHEDULERS = one_of(
    {**{name: name for name in SCHEDULERS}, "constant_with_warmup": "constant"}, "write training.scheduler"
)
_OPTIMIZERS = one_of(
    {
        "adamw": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_8bit": "adamw_8bit",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw",
        "paged_adamw_32bit": "paged_adamw",
        "paged_adamw_8bit": "paged_adamw_8bit",
    },
    "write training.optimizer: adamw, adamw_8bit, paged_adamw or paged_adamw_8bit",
)
_ON_INPUTS = one_of({False: "assistant", True: "all"})
_ONLY_ANSWERS = one_of({True: "assistant", False: "all"})
_STEPS = one_of({"steps": _NOTHING}, "saving and evaluating go by save_steps and eval_steps")

MODEL: dict[str, Alias] = {
    "base_model": _to("model.name_or_path"),
    "model_name_or_path": _to("model.name_or_path"),
    "model_name": _to("model.name_or_path"),
    "model_revision": _to("model.revision"),
    "revision_of_model": _to("model.revision"),
    "trust_remote_code": _to("model.trust_remote_code"),
    "torch_dtype": _to("model.dtype", one_of({name: name for name in ("bfloat16", "float16", "float32")})),
    "attn_implementation": _to("model.attention"),
    "flash_attention": _to("model.attention", one_of({True: "flash_attention_2", False: _NOTHING})),
    "sdp_attention": _to("model.attention", one_of({True: "sdpa", False: _NOTHING})),
    "eager_attention": _to("model.attention", one_of({True: "eager", False: _NOTHING})),
    "flash_attn": _to(
        "model.attention", one_of({"auto": "auto", "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"})
    ),
    "double_quantization": _to("model.double_quantization"),
    "use_bnb_nested_quant": _to("model.double_quantization"),
    "bnb_4bit_use_double_quant": _to("model.double_quantization"),
    "gradient_checkpointing": _to("memory.gradient_checkpointing", one_of({True: True, False: False})),
    "gradient_checkpointing_kwargs": _dropped("it is always non-reentrant"),
}
DATA: dict[str, Alias] = {
    "datasets": _to("data.train", values.dataset_list),
    "dataset": _to("data.train", values.dataset_files),
    "dataset_name": _to("data.train"),
    "test_datasets": _to("data.eval", values.dataset_list),
    "eval_dataset": _to("data.eval", values.dataset_files),
    "val_set_size": _to("data.eval", values.evaluation_share),
    "val_size": _to("data.eval", values.evaluation_share),
    "sequence_len": _to("data.max_length"),
    "cutoff_len": _to("data.max_length"),
    "max_seq_length": _to("data.max_length"),
    "max_length": _to("data.max_length"),
    "sample_packing": _to("data.packing", one_of({True: True, False: False})),
    "packing": _to("data.packing", one_of({True: True, False: False})),
    "train_on_inputs": _to("data.train_on", _ON_INPUTS),
    "train_on_prompt": _to("data.train_on", _ON_INPUTS),
    "mask_history": _to("data.train_on", one_of({True: "last", False: _NOTHING})),
    "assistant_only_loss": _to("data.train_on", _ONLY_ANSWERS),
    "completion_only_loss": _to("data.train_on", _ONLY_ANSWERS),
    "chat_template_path": _to("data.chat_template"),
    "shuffle_merged_datasets": _to("data.shuffle"),
    "disable_shuffling": _to("data.shuffle", values.negated),
}
ADAPTER: dict[str, Alias] = {
    "finetuning_type": _to("adapter.method"),
    "use_peft": Alias(None, one_of({True: _NOTHING}, "write adapter: {method: ...}")),
    "lora_r": _to("adapter.r"),
    "lora_rank": _to("adapter.r"),
    "lora_alpha": _to("adapter.alpha"),
    "lora_dropout": _to("adapter.dropout"),
    "lora_target_modules": _to("adapter.target_modules"),
    "lora_target": _to("adapter.target_modules", values.lora_targets),
    "lora_target_linear": _to("adapter.target_modules", one_of({True: "all-linear", False: _NOTHING})),
    "use_rslora": _to("adapter.use_rslora"),
    "peft_use_rslora": _to("adapter.use_rslora"),
    "lora_model_dir": _to("adapter.init_from"),
    "adapter_name_or_path": _to("adapter.init_from"),
    "stage": _to("objective.method"),
}
TRAINING: dict[str, Alias] = {
    "num_epochs": _to("training.epochs"),
    "num_train_epochs": _to("training.epochs"),
    "max_steps": _to("training.max_steps", values.unset_by_negative),
    "micro_batch_size": _to("training.micro_batch_size"),
    "per_device_train_batch_size": _to("training.micro_batch_size"),
    "gradient_accumulation_steps": _to("training.gradient_accumulation_steps"),
    "learning_rate": _to("training.learning_rate"),
    "lr_scheduler": _to("training.scheduler", _SCHEDULERS),
    "lr_scheduler_type": _to("training.scheduler", _SCHEDULERS),
    "lr_scheduler_kwargs": _to("training.scheduler_settings"),
    "warmup_steps": _to("training.warmup_steps"),
    "warmup_ratio": _to("training.warmup_ratio"),
    "optimizer": _to("training.optimizer", _OPTIMIZERS),
    "optim": _to("training.optimizer", _OPTIMIZERS),
    "weight_decay": _to("training.weight_decay"),
    "max_grad_norm": _to("training.max_grad_norm", values.turned_off_by_zero),
    "loraplus_lr_ratio": _to("training.loraplus_ratio"),
    "seed": _to("training.seed"),
    "save_steps": _to("training.save_steps"),
    "save_total_limit": _to("training.keep_checkpoints"),
    "eval_steps": _to("training.eval_steps"),
    "save_strategy": Alias(None, _STEPS),
    "eval_strategy": Alias(None, _STEPS),
    "do_train": Alias(None, one_of({True: _NOTHING}, "run `tunekit train`")),
}
EVALUATION_AND_OUTPUT: dict[str, Alias] = {
    "per_device_eval_batch_size": _to("evaluation.batch_size"),
    "eval_batch_size": _to("evaluation.batch_size"),
    "early_stopping_patience": _to("evaluation.patience"),
    "metric_for_best_model": _to("evaluation.best", values.best_metric),
    "predict_with_generate": _to("evaluation.generate"),
    "max_new_tokens": _to("evaluation.max_new_tokens"),
    "output_dir": _to("output.dir"),
    "report_to": _to("output.report_to", values.trackers),
    "use_tensorboard": _to("output.report_to", one_of({True: ["tensorboard"], False: _NOTHING})),
    "logging_steps": _dropped("every step is logged"),
}
HARMLESS: dict[str, Alias] = {
    **dict.fromkeys(
        ("logging_first_step", "logging_strategy", "log_level", "include_num_input_tokens_seen", "plot_loss"),
        _dropped("every step is logged"),
    ),
    **dict.fromkeys(
        (
            "dataset_prepared_path",
            "overwrite_cache",
            "preprocessing_num_workers",
            "dataset_num_proc",
            "dataset_processes",
        ),
        _dropped("rows are cached by their content"),
    ),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "remove_unused_columns"),
        _dropped("rows are ready before training begins"),
    ),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_log_model", "run_name"),
        _dropped("that tracker is not served; metrics.jsonl holds every number"),
    ),
    **dict.fromkeys(("logging_dir", "trackio_space_id"), _dropped("the run folder holds everything")),
    **dict.fromkeys(("pad_to_sequence_len", "pad_to_multiple_of"), _dropped("padding changes no result")),
    **dict.fromkeys(("group_by_length", "length_column_name"), _dropped("rows lie end to end without padding")),
    **dict.fromkeys(("strict", "local_rank", "debug", "ddp_timeout", "use_cache"), _dropped("it changes no result")),
    **dict.fromkeys(
        ("save_safetensors", "save_only_model"), _dropped("checkpoints are safetensors, for an exact resume")
    ),
    "overwrite_output_dir": _dropped("`tunekit train --overwrite` says so"),
    "tf32": _dropped("matrix products keep their precision"),
    "ddp_find_unused_parameters": _dropped("gradients are summed without DistributedDataParallel"),
    "use_fast_tokenizer": _dropped("the fast tokenizer is always used"),
}
LOST: dict[str, Alias] = {
    "deepspeed": Alias(None, lost("the device layer is accelerate")),
    "fsdp": Alias(None, lost("base weights are not sharded")),
    "fsdp_config": Alias(None, lost("base weights are not sharded")),
    "evals_per_epoch": Alias(None, lost("evaluation goes by steps", "write training.eval_steps")),
    "saves_per_epoch": Alias(None, lost("saving goes by steps", "write training.save_steps")),
    "neftune_noise_alpha": Alias(None, lost("there is no embedding noise")),
    "lora_modules_to_save": _to("adapter.modules_to_save"),
    "peft_use_dora": Alias(None, lost("it is an adapter of its own", "write adapter.method: dora")),
    "use_dora": Alias(None, lost("it is an adapter of its own", "write adapter.method: dora")),
    "push_to_hub": Alias(None, lost("nothing is uploaded")),
    "hub_model_id": Alias(None, lost("nothing is uploaded")),
    "resume_from_checkpoint": Alias(None, lost("resuming is a choice of the run", "run `tunekit train --resume`")),
}
TOP_LEVEL: dict[str, Alias] = {**MODEL, **DATA, **ADAPTER, **TRAINING, **EVALUATION_AND_OUTPUT, **HARMLESS, **LOST}

IN_ADAPTER: dict[str, Alias] = {
    "peft_type": _to("adapter.method", one_of({"LORA": "lora"})),
    "lora_alpha": _to("adapter.alpha"),
    "lora_dropout": _to("adapter.dropout"),
    "task_type": Alias(None, one_of({"CAUSAL_LM": _NOTHING})),
    "init_lora_weights": Alias(None, one_of({True: _NOTHING}, "write adapter.start")),
    "fan_in_fan_out": _dropped("it follows from the layer"),
    "inference_mode": Alias(None, one_of({False: _NOTHING})),
    "use_dora": Alias(None, lost("it is an adapter of its own", "write adapter.method: dora")),
}
# Keys that aliases.py reads together, because other tools spread one decision over several.
QUANTIZATION_KEYS = ("load_in_4bit", "load_in_8bit", "quantization_bit", "bnb_4bit_quant_type", "quantization_type")
PRECISION_KEYS = ("bf16", "fp16")
SOURCE_KEYS = {"max_samples": "max_rows", "dataset_train_split": "split", "dataset_text_field": "columns"}
TEMPLATE_KEYS = ("template", "chat_template")
TEMPLATES = {  # what names of templates begin with: what the names of bases begin or go on with whose tokenizer has it
    **{name: (name,) for name in ("llama", "qwen", "gemma", "mistral", "phi", "deepseek", "falcon", "glm", "granite")},
    "chatml": ("qwen", "smollm", "yi"),
    "command": ("command", "aya"),
}
FLAT = (*TOP_LEVEL, *QUANTIZATION_KEYS, *PRECISION_KEYS, *SOURCE_KEYS, *TEMPLATE_KEYS)


def alias_target(name: str) -> KeyPath | None:
    """tunekit's key for a foreign name; None where it is no alias, or has no key here."""
    if name in QUANTIZATION_KEYS:
        return ("model", "quantization")
    if name in PRECISION_KEYS:
        return ("model", "dtype")
    if name in TEMPLATE_KEYS:
        return ("data", "chat_template")
    if name in SOURCE_KEYS:
        return ("data", "train", 0, SOURCE_KEYS[name])
    alias = TOP_LEVEL.get(name) or IN_ADAPTER.get(name)
    return alias.target if alias else None


def meaning(name: str, value: object) -> tuple[KeyPath, object] | None:
    """tunekit's key and value for a foreign name and its value, wherever they stand; None where nothing is exact."""
    if name in QUANTIZATION_KEYS and value in (True, 4, 8):
        return ("model", "quantization"), "int8" if value == 8 or "8bit" in name else "nf4"
    alias = TOP_LEVEL.get(name) or IN_ADAPTER.get(name)
    try:
        ours = alias.translate(value) if alias and alias.target else _NOTHING
    except NotExact:
        return None
    return None if ours is _NOTHING or alias is None or alias.target is None else (alias.target, ours)


def is_alias(key: KeyPath) -> bool:
    """Whether a written key is another tool's."""
    if len(key) == 2 and key[0] == "adapter":
        return key[1] in IN_ADAPTER
    return len(key) == 1 and key[0] in FLAT
