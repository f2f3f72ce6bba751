"""The key names of Axolotl, LLaMA-Factory, TRL and PEFT, where those tools put them, and tunekit's key for each.

Comes in: nothing.  Goes out: `TOP_LEVEL` (flat files) and `IN_ADAPTER` (PEFT's names).
"""

from __future__ import annotations

from dataclasses import dataclass

from tunekit.recipe.foreign import values as values
from tunekit.recipe.foreign.values import NOTHING, Translate, always_so, lost, one_of, same
from tunekit.recipe.reading.draft import KeyPath


@dataclass(frozen=True)
class Alias:
    """Where a foreign key goes and how its value is translated; no target: it never writes anything."""

    target: KeyPath | None
    translate: Translate


def _to(dotted_key: str, *names: str, by: Translate = same) -> dict[str, Alias]:
    """Names of one of our keys."""
    return dict.fromkeys(names, Alias(tuple(dotted_key.split(".")), by))


def _nowhere(by: Translate, *names: str) -> dict[str, Alias]:
    """Names of keys that say nothing here, or cannot be obeyed."""
    return dict.fromkeys(names, Alias(None, by))


_SCHEDULERS = one_of(
    {"cosine": "cosine", "linear": "linear", "constant_with_warmup": "constant", "constant": "constant"},
    "write training.scheduler: constant, linear or cosine",
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
_SWITCH = one_of({True: True, False: False})
_ATTENTION = one_of({"auto": "auto", "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"})
PRECISION_KEYS = ("bf16", "fp16")

TOP_LEVEL: dict[str, Alias] = {
    **_to("model.name_or_path", "base_model", "model_name_or_path", "model_name"),
    **_to("model.revision", "model_revision", "revision_of_model"),
    **_to("model.trust_remote_code", "trust_remote_code"),
    **_to("model.dtype", "torch_dtype", by=one_of({name: name for name in ("bfloat16", "float16", "float32")})),
    **_to("model.attention", "attn_implementation"),
    **_to("model.attention", "flash_attention", by=one_of({True: "flash_attention_2", False: NOTHING})),
    **_to("model.attention", "sdp_attention", by=one_of({True: "sdpa", False: NOTHING})),
    **_to("model.attention", "eager_attention", by=one_of({True: "eager", False: NOTHING})),
    **_to("model.attention", "flash_attn", by=_ATTENTION),
    **_to("model.double_quantization", "double_quantization", "use_bnb_nested_quant", "bnb_4bit_use_double_quant"),
    # The keys of the next three lines are read together (rewrite.py), for other tools spread one decision over several.
    **_to("model.quantization", "load_in_4bit", "load_in_8bit", "quantization_bit"),
    **_to("model.quantization", "bnb_4bit_quant_type", "quantization_type"),
    **_to("model.dtype", *PRECISION_KEYS),
    **_to("memory.gradient_checkpointing", "gradient_checkpointing", by=_SWITCH),
    **_nowhere(always_so, "gradient_checkpointing_kwargs"),  # it is always non-reentrant
    **_to("data.train", "datasets", by=values.dataset_list),
    **_to("data.train", "dataset", by=values.dataset_files),
    **_to("data.train", "dataset_name"),
    **_to("data.eval", "test_datasets", by=values.dataset_list),
    **_to("data.eval", "eval_dataset", by=values.dataset_files),
    **_to("data.eval", "val_set_size", "val_size", by=values.evaluation_share),
    **_to("data.max_length", "sequence_len", "cutoff_len", "max_seq_length", "max_length"),
    **_to("data.packing", "sample_packing", "packing", by=_SWITCH),
    **_to("data.train_on", "train_on_inputs", "train_on_prompt", by=one_of({False: "assistant", True: "all"})),
    **_to("data.train_on", "mask_history", by=one_of({True: "last", False: NOTHING})),
    **_to("data.train_on", "assistant_only_loss", "completion_only_loss", by=one_of({True: "assistant", False: "all"})),
    **_nowhere(one_of({"tokenizer_default": NOTHING}, "write data.chat_template: FILE"), "chat_template"),
    **_to("data.chat_template", "chat_template_path"),
    **_to("data.shuffle", "shuffle_merged_datasets"),
    **_to("data.shuffle", "disable_shuffling", by=values.negated),
    **_to("adapter.method", "finetuning_type"),
    **_nowhere(one_of({True: NOTHING}, "write adapter: {method: ...}"), "use_peft"),
    **_to("adapter.r", "lora_r", "lora_rank"),
    **_to("adapter.alpha", "lora_alpha"),
    **_to("adapter.dropout", "lora_dropout"),
    **_to("adapter.target_modules", "lora_target_modules"),
    **_to("adapter.target_modules", "lora_target", by=values.lora_targets),
    **_to("adapter.target_modules", "lora_target_linear", by=one_of({True: "all-linear", False: NOTHING})),
    **_to("adapter.use_rslora", "use_rslora", "peft_use_rslora"),
    **_to("adapter.init_from", "lora_model_dir", "adapter_name_or_path"),
    **_to("adapter.modules_to_save", "lora_modules_to_save"),
    **_nowhere(lost("it is an adapter of its own", "write adapter.method: dora"), "use_dora", "peft_use_dora"),
    **_to("objective.method", "stage"),
    **_to("training.epochs", "num_epochs", "num_train_epochs"),
    **_to("training.max_steps", "max_steps", by=values.unset_by_negative),
    **_to("training.micro_batch_size", "micro_batch_size", "per_device_train_batch_size"),
    **_to("training.gradient_accumulation_steps", "gradient_accumulation_steps"),
    **_to("training.learning_rate", "learning_rate"),
    **_to("training.scheduler", "lr_scheduler", "lr_scheduler_type", by=_SCHEDULERS),
    **_to("training.warmup_steps", "warmup_steps"),
    **_to("training.warmup_ratio", "warmup_ratio"),
    **_to("training.optimizer", "optimizer", "optim", by=_OPTIMIZERS),
    **_to("training.weight_decay", "weight_decay"),
    **_to("training.max_grad_norm", "max_grad_norm", by=values.turned_off_by_zero),
    **_to("training.loraplus_ratio", "loraplus_lr_ratio"),
    **_to("training.seed", "seed"),
    **_to("training.save_steps", "save_steps"),
    **_to("training.keep_checkpoints", "save_total_limit"),
    **_to("training.eval_steps", "eval_steps"),
    **_nowhere(
        one_of({"steps": NOTHING}, "saving and evaluating go by save_steps and eval_steps"),
        "save_strategy",
        "eval_strategy",
    ),
    **_nowhere(one_of({True: NOTHING}, "run `tunekit train`"), "do_train"),
    **_to("evaluation.batch_size", "per_device_eval_batch_size", "eval_batch_size"),
    **_to("evaluation.patience", "early_stopping_patience"),
    **_to("evaluation.best", "metric_for_best_model", by=values.best_metric),
    **_to("evaluation.generate", "predict_with_generate"),
    **_to("evaluation.max_new_tokens", "max_new_tokens"),
    **_to("output.dir", "output_dir"),
    **_to("output.report_to", "report_to", by=values.trackers),
    **_to("output.report_to", "use_tensorboard", by=one_of({True: ["tensorboard"], False: NOTHING})),
    **_nowhere(always_so, "logging_steps"),  # every step is logged
    **_nowhere(lost("the device layer is accelerate"), "deepspeed"),
    **_nowhere(lost("base weights are not sharded"), "fsdp", "fsdp_config"),
    **_nowhere(lost("evaluation goes by steps", "write training.eval_steps"), "evals_per_epoch"),
    **_nowhere(lost("saving goes by steps", "write training.save_steps"), "saves_per_epoch"),
    **_nowhere(lost("rows are padded to the longest of their batch"), "pad_to_sequence_len"),
    **_nowhere(lost("the order is a pure function of the seed"), "group_by_length"),
    **_nowhere(lost("there is no embedding noise"), "neftune_noise_alpha"),
    **_nowhere(lost("matrix products keep their precision"), "tf32"),
    **_nowhere(lost("templates have no names here", "write data.chat_template: FILE, or nothing"), "template"),
    **_nowhere(lost("that tracker is not served", "write output.report_to"), "wandb_project"),
    **_nowhere(lost("nothing is uploaded"), "push_to_hub", "hub_model_id"),
    **_nowhere(lost("resuming is a choice of the run", "run `tunekit train --resume`"), "resume_from_checkpoint"),
    **_nowhere(lost("a run folder is never overwritten", "choose another output.dir"), "overwrite_output_dir"),
    **_nowhere(lost("the cache is keyed by content and needs no place"), "dataset_prepared_path"),
}
IN_ADAPTER: dict[str, Alias] = {
    **_to("adapter.method", "peft_type", by=one_of({"LORA": "lora"})),
    **_to("adapter.alpha", "lora_alpha"),
    **_to("adapter.dropout", "lora_dropout"),
    **_nowhere(one_of({"CAUSAL_LM": NOTHING}), "task_type"),
    **_nowhere(one_of({True: NOTHING}, "write adapter.start"), "init_lora_weights"),
    **_nowhere(always_so, "fan_in_fan_out"),  # it follows from the layer
    **_nowhere(one_of({False: NOTHING}), "inference_mode"),
    "use_dora": TOP_LEVEL["use_dora"],
}


def alias_target(name: str) -> KeyPath | None:
    """tunekit's key for a foreign name; None where it is no alias, or has no key here."""
    alias = TOP_LEVEL.get(name) or IN_ADAPTER.get(name)
    return alias.target if alias else None


def is_alias(key: KeyPath) -> bool:
    """Whether a written key is another tool's."""
    if len(key) == 2 and key[0] == "adapter":
        return key[1] in IN_ADAPTER
    return len(key) == 1 and key[0] in TOP_LEVEL
