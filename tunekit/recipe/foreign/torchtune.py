"""Translates torchtune's configurations. Each of their sections names a component and its arguments.

Source: torchtune's recipes/configs, and the arguments of the builders in these files.
"""

import re
from collections.abc import Mapping
from typing import Any

from tunekit.recipe.foreign.alias import Alias, dropped, nowhere, to
from tunekit.recipe.foreign.become import write_unlimited
from tunekit.recipe.foreign.nested import Theirs, take_all
from tunekit.recipe.foreign.table import TOP_LEVEL
from tunekit.recipe.foreign.values import NOTHING, NotExact, Translate, exactly, lost, mapping_of, one_of, these
from tunekit.recipe.reading.draft import Draft
from tunekit.recipe.reading.suggest import show

COMPONENT = "_component_"
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
HEAD, TAIL = re.compile(r"(\w+)\[:(\d+)%\]"), re.compile(r"(\w+)\[(\d+)%:\]")  # such as train[:95%]
ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
MLP = ("gate_proj", "up_proj", "down_proj")
FUSED = ("phi3", "phi4")  # their modules have other names in transformers
NOT_TEXT = ("vision", "clip", "flamingo")
PAIRED = {"question": "prompt", "response_j": "chosen", "response_k": "rejected"}
DATASETS: dict[str, dict[str, Any]] = {  # the source of a builder without arguments
    "alpaca_dataset": {"path": "tatsu-lab/alpaca", "format": "alpaca_turn"},
    "alpaca_cleaned_dataset": {"path": "yahma/alpaca-cleaned", "format": "alpaca_turn"},
    "slimorca_dataset": {"path": "Open-Orca/SlimOrca-Dedup", "format": "sharegpt"},
    "stack_exchange_paired_dataset": {
        "path": "lvwerra/stack-exchange-paired",
        "format": "preference",
        "columns": PAIRED,
    },
    "chat_dataset": {},
    "instruct_dataset": {"format": "alpaca", "columns": {"input": "instruction"}},  # two turns
    "preference_dataset": {"format": "preference"},
    "text_completion_dataset": {"format": "text"},
}
FIELDS = {"input": "instruction", "output": "output", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
TRAINS_ON_PROMPTS = ("alpaca_dataset", "alpaca_cleaned_dataset")  # unless train_on_input is false
TEXTS = ("source", "split", "column", "conversation_style", "conversation_column")  # arguments of a data set
FILES = ("json", "csv", "parquet", "text")  # values of `source` that name a file type
OPTIMIZERS = {
    "torch.optim.AdamW": "adamw",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
}
SCHEDULE, SCHEDULES = f"lr_scheduler.{COMPONENT}", {"get_cosine_schedule_with_warmup": "cosine"}
DIVERGENCES = {  # divergence loss -> objective.beta
    f"{name}{chunks}Loss": beta
    for name, beta in {"ForwardKL": 0.0, "ReverseKL": 1.0}.items()
    for chunks in ("", "WithChunkedOutput")
}
DISTILLATION = f"kd_loss.{COMPONENT}"
LOSSES = {
    **dict.fromkeys(("LinearCrossEntropyLoss", "CEWithChunkedOutputLoss", "CrossEntropyLoss"), NOTHING),
    **dict.fromkeys(("DPOLoss", "RSOLoss"), "dpo"),
}
TEACHER = "teacher_checkpointer.checkpoint_dir"
LOGGERS = {"WandBLogger": ["wandb"], "TensorBoardLogger": ["tensorboard"], "CometLogger": ["comet_ml"]}


def component(known: Mapping[str, object], how: str, what: str = "") -> Translate:
    """A function that translates a component by the last part of its name: DPOLoss of `torchtune.rlhf.loss.DPOLoss`."""

    def translate(value: object) -> object:
        if (name := _last(value)) in known:
            return known[name]
        raise NotExact(f"{what}{show(name)} has no exact translation", how)

    return translate


def optimizer(value: object) -> object:
    """Translate an optimizer class by its full name. Raises: NotExact for other classes."""
    if isinstance(value, str) and value in OPTIMIZERS:
        return OPTIMIZERS[value]
    raise NotExact(f"{show(value)} has no exact translation", f"known: {', '.join(OPTIMIZERS)}")


SAME = {  # keys with the same meaning as in flat configurations
    "": ("seed", "gradient_accumulation_steps", "output_dir", "resume_from_checkpoint", "learning_rate"),
    "model.": ("lora_rank", "lora_alpha", "lora_dropout"),
    "optimizer.": ("weight_decay",),
    "loss.": ("beta", "label_smoothing"),
}
TABLE: dict[str, Alias] = {
    **{f"{section}{name}": TOP_LEVEL[name] for section, names in SAME.items() for name in names},
    **to("model.name_or_path", "checkpointer.checkpoint_dir"),
    **to("model.dtype", "dtype", by=one_of({"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"})),
    **to("data.max_length", "tokenizer.max_seq_len"),
    **to("data.shuffle", "shuffle"),
    **to("training.epochs", "epochs"),
    **to("training.micro_batch_size", "batch_size"),
    **to("training.learning_rate", "optimizer.lr"),
    **to("training.optimizer", f"optimizer.{COMPONENT}", by=optimizer),
    **to("training.scheduler", SCHEDULE, by=component(SCHEDULES, "write training.scheduler")),
    **to("training.eval_steps", "run_val_every_n_steps"),
    **to("training.save_steps", "save_every_n_steps"),
    **to("training.keep_checkpoints", "checkpointer.keep_last_n_checkpoints"),
    **to("evaluation.batch_size", "batch_size_val"),
    **to("memory.gradient_checkpointing", "enable_activation_checkpointing", by=these(True, False)),
    **nowhere(exactly(False, how="write memory.activation_offload"), "enable_activation_offloading"),
    **to("output.report_to", f"metric_logger.{COMPONENT}", by=lambda value: LOGGERS.get(_last(value), NOTHING)),
    f"loss.{COMPONENT}": Alias(
        ("objective", "method"),
        component(LOSSES, "write objective", "the loss "),
        "the loss is always the mean over supervised tokens",
    ),
    **to("objective.beta", "loss.gamma"),  # RSOLoss
    **to("objective.beta", DISTILLATION, by=component(DIVERGENCES, "write objective.beta", "the loss ")),
    **to("objective.kd_ratio", "kd_ratio"),
    **to("objective.teacher", TEACHER, by=lambda value: {"name_or_path": value}),
    **nowhere(exactly(0.5, how="write training.scheduler"), "lr_scheduler.num_cycles"),
    **to("training.warmup_steps", "lr_scheduler.num_warmup_steps"),
    **nowhere(
        lost("adapter.init_from names an adapter to continue", "write adapter.init_from"),
        "checkpointer.adapter_checkpoint",
    ),
    **nowhere(lost("the tokenizer's own template is used", "write data.chat_template"), "tokenizer.prompt_template"),
    **nowhere(lost("tunekit has no quantization-aware training"), "quantizer.*"),
    **dropped("the teacher's files define this setting", "teacher_model.*", "teacher_checkpointer.*"),
    **dropped("logits are computed in chunks", "loss.num_output_chunks", "kd_loss.num_output_chunks"),
    **dropped("a mask, not a label, marks tokens without loss", "loss.ignore_index", "loss.mask_ignored_tokens"),
    **dropped("a mask, not a label, marks tokens without loss", "kd_loss.ignore_index"),
    **dropped(
        TOP_LEVEL["fsdp"].why, "fsdp.*", "fsdp_cpu_offload", "fsdp_reshard_after_forward", "custom_sharded_layers"
    ),
    **nowhere(exactly(1, how="run torchrun"), "tensor_parallel_dim", "context_parallel_dim"),
    **dropped("the model's files define this setting", "checkpointer.*", "tokenizer.*", "ref_checkpointer.*"),
    **dropped("this setting changes no result", "optimizer.fused", "optimizer_in_bwd", "compile", "low_cpu_ram"),
    **dropped("use --device", "device"),
    **dropped("every step is logged", "log_every_n_steps", "log_peak_memory_stats", "log_level", "metric_logger.*"),
    **nowhere(
        lost("training.max_steps counts the steps of all epochs", "write training.max_steps"), "max_steps_per_epoch"
    ),
    **dropped("the run folder contains all files of the run", "save_adapter_weights_only"),
    **dropped("report.json has the time and memory of each part", "profiler.*"),
}


def rewrite_torchtune(draft: Draft) -> None:
    """Replace every key of a configuration of torchtune, in place."""
    theirs = take_all(draft)
    for name, (value, place) in theirs.values.items():
        theirs.values[name] = (_referred(theirs, value), place)
    _write_method(theirs)
    if _last(theirs.get(f"loss.{COMPONENT}")) == "RSOLoss":
        theirs.write(f"loss.{COMPONENT}", "objective.loss_type", "hinge")
    if theirs.get(DISTILLATION) is not None:
        theirs.write(DISTILLATION, "objective.method", "distill")
        if theirs.get("kd_ratio") is None:
            theirs.write(DISTILLATION, "objective.kd_ratio", 0.5)  # default of torchtune's recipe
    _write_steps(theirs)
    _write_sources(theirs)
    if theirs.get("optimizer.weight_decay") is None:
        theirs.write(f"optimizer.{COMPONENT}", "training.weight_decay", 0.01)  # torch's default
    if theirs.get(SCHEDULE) is None:
        theirs.write(SCHEDULE, "training.scheduler", "constant")
        theirs.write(SCHEDULE, "training.warmup_ratio", 0.0)
    clip = theirs.take("clip_grad_norm")
    theirs.write("clip_grad_norm", "training.max_grad_norm", float(clip) if type(clip) is int else clip)
    _write_max_length(theirs)
    theirs.settle(TABLE)


def _write_max_length(theirs: Theirs) -> None:
    """Write data.max_length if torchtune has no limit."""
    key = "tokenizer.max_seq_len"
    if theirs.get(key) is None:
        theirs.take(key)
        write_unlimited(theirs.draft, theirs.places[key], key, packing=theirs.draft.get(("data", "packing")) is True)


def _referred(theirs: Theirs, value: object) -> object:
    """The value with every `${key}` replaced by the value of that key."""
    if not isinstance(value, str):
        return value
    if whole := REFERENCE.fullmatch(value):
        return theirs.get(whole[1], value)
    return REFERENCE.sub(lambda found: str(theirs.get(found[1], found[0])), value)


def _last(component: object) -> str:
    return str(component).rpartition(".")[2]


def _write_method(theirs: Theirs) -> None:
    """Translate the builder's name and options to adapter.method, adapter.target_modules and model.quantization."""
    key = f"model.{COMPONENT}"
    builder = str(theirs.take(key, ""))
    if any(word in builder for word in NOT_TEXT):
        theirs.complain(key, f"{show(builder)} is not a text-only model", "choose another base")
    name = _last(builder)
    trained, quantized = name.startswith(("lora_", "qlora_")), theirs.take("model.quantize_base", False)
    dora = theirs.take("model.use_dora", False)
    theirs.write(key, "adapter.method", "full" if not trained else "dora" if dora is True else "lora")
    if name.startswith("qlora_") or quantized is True:
        theirs.write(key, "model.quantization", "nf4")
    attention = theirs.take("model.lora_attn_modules", [])
    mlp, output = (theirs.take(f"model.apply_lora_to_{part}", False) for part in ("mlp", "output"))
    if not trained:
        return
    if not isinstance(attention, list):
        theirs.complain("model.lora_attn_modules", f"must be a list, not {show(attention)}", "write [q_proj, v_proj]")
        return
    unknown = [each for each in attention if not isinstance(each, str) or each not in ATTENTION]
    if any(word in builder for word in FUSED) or unknown:
        what = "some of these modules have other names in transformers' model"
        theirs.complain("model.lora_attn_modules", what, "write adapter.target_modules (`tunekit plan` lists names)")
        return
    modules = [*(ATTENTION[each] for each in attention), *(MLP if mlp is True else ())]
    modules += ["lm_head"] if output is True else []
    theirs.write("model.lora_attn_modules", "adapter.target_modules", modules)


def _write_steps(theirs: Theirs) -> None:
    """Translate max_steps_per_epoch and epochs to training.max_steps. The learning rate's schedule stays the same, but
    the order of rows differs."""
    steps, epochs = theirs.get("max_steps_per_epoch"), theirs.get("epochs", 1)
    if not (isinstance(steps, int) and isinstance(epochs, int)) or min(steps, epochs) < 1:
        return
    theirs.take("max_steps_per_epoch")
    theirs.write("max_steps_per_epoch", "training.max_steps", steps * epochs)
    if theirs.take("epochs") is not None:
        theirs.record(
            "epochs",
            f"nothing (if an epoch has fewer than {steps} steps, write training.epochs instead of training.max_steps)",
        )


def _write_sources(theirs: Theirs) -> None:
    """Translate dataset, datasets and dataset_val to data.train, data.eval, data.packing and data.train_on."""
    _write_share(theirs)
    for section, target in (("dataset", "data.train"), ("datasets", "data.train"), ("dataset_val", "data.eval")):
        listed = theirs.take(section)
        parts = listed if isinstance(listed, list) else [_section(theirs, section)]
        sources: list[dict[str, Any]] = []
        for part in [part for part in parts if part]:
            try:
                source, of_all = _source(part)
                for key, value in of_all.items():
                    if theirs.draft.get(tuple(key.split("."))) != value:
                        theirs.write(section, key, value)
                sources.append(source)
            except NotExact as no:
                theirs.complain(section, no.what, no.how)
                theirs.draft.untranslated.add(tuple(target.split(".")))
        if sources:
            theirs.write(section, target, sources)


def _write_share(theirs: Theirs) -> None:
    """Translate the splits `train[:95%]` and `train[95%:]` to a fraction in data.eval. The evaluation rows are drawn at
    random."""
    splits = [str(theirs.get(f"{section}.split", "")) for section in ("dataset", "dataset_val")]
    head, tail = HEAD.fullmatch(splits[0]), TAIL.fullmatch(splits[1])
    if head is None or tail is None or head.groups() != tail.groups():
        return
    for name in [name for name in theirs.values if name.startswith("dataset_val.")]:
        theirs.take(name)
    theirs.values["dataset.split"] = (head[1], theirs.values["dataset.split"][1])
    theirs.write("dataset_val.split", "data.eval", round(1 - int(head[2]) / 100, 2))


def _section(theirs: Theirs, section: str) -> dict[str, Any]:
    """Remove one section, and return its arguments by name."""
    names = [name for name in theirs.values if name.startswith(f"{section}.")]
    if names:
        theirs.places[section] = theirs.values[names[0]][1]
    return {name.partition(".")[2]: theirs.take(name) for name in names}


def _arguments(part: object) -> tuple[dict[str, Any], dict[Any, Any]]:
    """The non-empty arguments of one data set, and its column_map. Raises: NotExact if a value has a wrong type."""
    if not isinstance(part, dict):
        raise NotExact(f"{show(part)} is not a data set with its arguments", "write data.train")
    mapped = mapping_of(part, "column_map")
    arguments = {name: value for name, value in part.items() if value is not None and name != "column_map"}
    texts = {name: arguments[name] for name in TEXTS if name in arguments}
    for name, value in (texts | {f"column_map.{name}": column for name, column in mapped.items()}).items():
        if not isinstance(value, str):
            raise NotExact(f"{name} must be a text, not {show(value)}", "write data.train")
    return arguments, mapped


def _source(part: object) -> tuple[dict[str, Any], dict[str, object]]:
    """Translate the arguments of one data set: to a source, and to keys that apply to all sources. Raises: NotExact."""
    arguments, mapped = _arguments(part)
    builder = _last(arguments.pop(COMPONENT, ""))
    if builder not in DATASETS:
        how = f"known: {', '.join(DATASETS)}; write data.train"
        raise NotExact(f"the data set {show(builder)} has no exact translation", how)
    source = dict(DATASETS[builder])
    on_prompts = arguments.pop("train_on_input", builder in TRAINS_ON_PROMPTS)
    of_all: dict[str, object] = {"data.packing": bool(arguments.pop("packed", False))}
    if source.get("format") != "preference":
        of_all["data.train_on"] = "all" if on_prompts else "assistant"
    path, files = arguments.pop("source", source.get("path")), arguments.pop("data_files", None)
    if path in FILES and not isinstance(files, str):
        raise NotExact("the files of a data set must be one path", "write data.train")
    source["path"] = files if path in FILES else path
    if builder == "chat_dataset":
        source["format"] = {"sharegpt": "sharegpt", "openai": "chat"}.get(arguments.pop("conversation_style", ""))
        field = "conversations" if source["format"] == "sharegpt" else "messages"
        column = arguments.pop("conversation_column", field)
        source |= {"columns": {column: field}} if column != field else {}
    if builder == "text_completion_dataset":
        column = arguments.pop("column", "text")
        source |= {"columns": {column: "text"}} if column != "text" else {}
    split = arguments.pop("split", "train")
    if "[" in str(split):
        raise NotExact(f"a part of a split ({split}) cannot be a source", "write data.eval: a fraction, or max_rows")
    source |= {"split": split} if split != "train" else {}
    if any(name not in FIELDS for name in mapped):
        raise NotExact(f"column_map {show(mapped)} has no exact translation", "write columns under the source")
    if mapped:
        source["columns"] = {column: FIELDS[name] for name, column in mapped.items() if column != FIELDS[name]}
    others = [name for name, value in arguments.items() if value not in (None, False)]
    if others or not source.get("format") or not source.get("path"):
        what = f"'{others[0]}' would be lost" if others else "source or conversation_style is missing"
        raise NotExact(what, "write the source under data.train")
    return source, of_all
