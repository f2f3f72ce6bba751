"""Translates Unsloth's configurations (sections model, data, training, lora, logging) and the options of its script.

Source: unsloth_cli/config.py and unsloth-cli.py.
"""

from tunekit.recipe.foreign import values
from tunekit.recipe.foreign.alias import Alias, dropped, nowhere, to
from tunekit.recipe.foreign.nested import Theirs, take_all
from tunekit.recipe.foreign.table import TOP_LEVEL
from tunekit.recipe.foreign.values import NOTHING, NotExact, exactly, lost, one_of, switch, these
from tunekit.recipe.reading.draft import Draft
from tunekit.recipe.reading.suggest import show

FORMATS = {"auto": "auto", "alpaca": "alpaca_with_input", "chatml": "chat", "sharegpt": "sharegpt"}
RAW_TEXT = (".txt", ".md", ".json", ".jsonl")  # endings of files that the script reads as raw text
AUTO_ROWS = (
    "Unsloth renders rows of instruction, input and output with Alpaca's prompt; if the rows have these columns, write "
    f"format: {FORMATS['alpaca']}"
)
INDENTED = "the script's prompt is alpaca_with_input with each line after the first indented by four spaces"
_RECOMPUTED = one_of({"unsloth": True, "true": True, True: True, "none": False, False: False})
_LOFTQ = switch("loftq")
_IMAGES = "tunekit does not train models that read images and write text"


def unset_by_zero(value: object) -> object:
    """Translate 0 to NOTHING, because 0 means "not set" in Unsloth; other values do not change."""
    return NOTHING if value == 0 and not isinstance(value, bool) else value


def _dtype(value: object) -> object:
    return NOTHING if value in ("None", "none", "auto") else these("bfloat16", "float16")(value)


def _rows(value: object) -> object:
    """Translate the data set of Unsloth's script. Raises: NotExact for a file of raw text."""
    if str(value).endswith(RAW_TEXT):
        raise NotExact("the script cuts a file into overlapping chunks of raw text", "write data.train")
    return [{"path": value, "format": FORMATS["alpaca"]}]


SECTIONS: dict[str, Alias] = {
    **to("model.name_or_path", "model"),
    **to("model.quantization", "training.load_in_4bit", by=one_of({True: "nf4", False: "none"})),
    **to("data.max_length", "training.max_seq_length"),
    **to("data.packing", "training.packing", by=these(True, False)),
    **to("data.train_on", "training.train_on_completions", by=one_of({True: "assistant", False: "all"})),
    **{f"lora.{name}": TOP_LEVEL[name] for name in ("lora_r", "lora_alpha", "lora_dropout", "use_rslora")},
    **to("adapter.target_modules", "lora.target_modules", by=values.lora_targets),
    **to("adapter.method", "lora.use_dora", by=one_of({True: "dora", False: "lora"})),
    **to(
        "adapter.method", "training.training_type", by=one_of({"full": "full", "lora": NOTHING}, "write adapter.method")
    ),
    **to("output.report_to", "logging.enable_wandb", by=switch(["wandb"])),
    **to("output.report_to", "logging.enable_tensorboard", by=switch(["tensorboard"])),
    **to("adapter.start", "lora.use_loftq", by=_LOFTQ),
    **nowhere(exactly(True, how="write adapter.target_modules"), "lora.finetune_attention_modules"),
    **nowhere(exactly(True, how="write adapter.target_modules"), "lora.finetune_mlp_modules"),
    **nowhere(exactly(True, how=_IMAGES), "lora.finetune_language_layers"),
    **dropped(_IMAGES, "lora.finetune_vision_layers", "lora.vision_all_linear"),
    **to("training.epochs", "training.num_epochs", by=unset_by_zero),
    **to("training.max_steps", "training.max_steps", by=unset_by_zero),
    **to("training.save_steps", "training.save_steps", by=unset_by_zero),
    **to("training.micro_batch_size", "training.batch_size"),
    **to("training.seed", "training.random_seed"),
    **to("memory.gradient_checkpointing", "training.gradient_checkpointing", by=_RECOMPUTED),
    **{
        f"training.{name}": TOP_LEVEL[name]
        for name in (
            *("learning_rate", "gradient_accumulation_steps", "warmup_steps", "warmup_ratio", "weight_decay"),
            *("optim", "lr_scheduler_type", "output_dir"),
        )
    },
    **dropped("metrics.jsonl contains all metrics", "logging.*"),
    **dropped("`tunekit chat` and `generate` have their own options", "inference.*"),
}
OPTIONS: dict[str, Alias] = {  # options of unsloth-cli.py: TRL's keys and these
    **TOP_LEVEL,
    **to("model.quantization", "load_in_4bit", by=switch("nf4")),
    **to("model.dtype", "dtype", by=_dtype),
    **to("adapter.r", "r"),
    **to("adapter.bias", "bias"),
    **to("adapter.method", "use_dora", by=switch("dora")),
    **to("data.train", "dataset", by=_rows),
    **to("adapter.start", "loftq_config", by=lambda value: NOTHING if value in ("None", "none") else "loftq"),
    **to("memory.gradient_checkpointing", "use_gradient_checkpointing", by=_RECOMPUTED),
    **dropped("training.seed is also the seed of the adapter's initialisation", "random_state"),
    **dropped("run `tunekit merge` or `tunekit export` on the result", "save_model", "save_method", "save_gguf"),
    **dropped("run `tunekit merge` or `tunekit export` on the result", "save_path", "quantization"),
    **dropped(TOP_LEVEL["push_to_hub"].why, "push_model", "push_gguf", "hub_path"),
    **nowhere(
        lost("tunekit cuts texts to data.max_length", "write data.train"), "raw_text_file", "chunk_size", "stride"
    ),
}


def rewrite_sections(draft: Draft) -> None:
    """Replace every key of Unsloth's configuration file, which has sections, in place."""
    theirs = take_all(draft)
    _write_sources(theirs)
    if theirs.get("training.training_type") == "full":
        for name in [name for name in theirs.values if name.startswith("lora.")]:
            theirs.take(name)
            theirs.record(name, "nothing (training_type: full trains every weight)")
    theirs.settle(SECTIONS)


def rewrite_options(draft: Draft) -> None:
    """Replace every option of Unsloth's script, in place."""
    theirs = take_all(draft)
    if theirs.get("dataset") is not None:
        draft.rewrites.append(f"{theirs.values['dataset'][1]}: {INDENTED}")
    theirs.settle(OPTIONS)


def _write_sources(theirs: Theirs) -> None:
    """Write data.train, with one format: the hub data set in data.dataset, and the files in data.local_dataset."""
    kind = theirs.take("data.format_type", "auto")
    hub, files = theirs.take("data.dataset"), theirs.take("data.local_dataset", [])
    if not isinstance(kind, str) or kind not in FORMATS:
        theirs.complain("data.format_type", f"{show(kind)} has no exact translation", f"known: {', '.join(FORMATS)}")
        theirs.draft.untranslated.add(("data", "train"))
        return
    name = "data.local_dataset" if files else "data.dataset"
    paths = [*([hub] if hub else []), *(files if isinstance(files, list) else [files])]
    if paths:
        theirs.write(name, "data.train", [{"path": path, "format": FORMATS[kind]} for path in paths])
        if kind == "auto":
            theirs.draft.rewrites.append(f"{theirs.places[name]}: {AUTO_ROWS}")
