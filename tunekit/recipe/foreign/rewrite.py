"""Rewrites other tools' keys to tunekit's keys, and records each rewrite with its place.
Two keys for the same setting are a problem, and also a value without an exact translation.
"""

import json
import os
from math import prod
from pathlib import Path
from typing import Any

from tunekit.recipe.bases.paths import DATA_ENDINGS, is_like_path
from tunekit.recipe.foreign.become import complain, record, rewrite, take, write
from tunekit.recipe.foreign.datasets import name_sources
from tunekit.recipe.foreign.sources import translate_sources
from tunekit.recipe.foreign.table import IN_ADAPTER, PRECISION_KEYS, SOURCE_KEYS, TEMPLATE_KEYS, TEMPLATES, TOP_LEVEL
from tunekit.recipe.reading.draft import Draft, KeyPath, Place, dotted
from tunekit.recipe.reading.suggest import show

QUANTIZATION: KeyPath = ("model", "quantization")
METHOD: KeyPath = ("adapter", "method")
TRAIN: KeyPath = ("data", "train")
EVAL: KeyPath = ("data", "eval")
EVAL_ROWS = "write data.eval: FILE, or a fraction such as 0.05"
DORA: tuple[KeyPath, ...] = (("use_dora",), ("peft_use_dora",), ("adapter", "use_dora"))
STRATEGIES = {"eval_strategy": "eval_steps", "save_strategy": "save_steps"}
SPECIAL_TOKENS: tuple[KeyPath, ...] = (
    ("eos_token",),
    *(("special_tokens", name) for name in ("eos_token", "bos_token", "unk_token")),
)
MAX_FILE_BYTES = 8 << 20
PER_EPOCH = {"evals_per_epoch": "training.eval_steps", "saves_per_epoch": "training.save_steps"}
UNSET = "nothing (the device decides)"
_FOUR_BIT_KINDS = ("bnb_4bit_quant_type", "quantization_type")


def rewrite_aliases(draft: Draft) -> None:
    """Replace every key of another tool in the draft, in place."""
    name_sources(draft)
    translate_sources(draft)
    _rewrite_minimum_rate(draft)
    if draft.get(("stage",)) == "pt" and draft.get(("packing",)) is not False:
        # LLaMA-Factory joins texts and cuts them to equal lengths; without packing, it truncates them
        write(draft, ("data", "excess_length"), "split", draft.place(("stage",)), "stage: pt")
        if not draft.has(("packing",)):
            write(draft, ("data", "packing"), True, draft.place(("stage",)), "stage: pt")
    _rewrite_pissa(draft)
    for name in PER_EPOCH:
        if (found := take(draft, name)) is not None:
            _settle_per_epoch(draft, name, PER_EPOCH[name], *found)
    strategy, dataset = draft.get(("eval_strategy",)), draft.get(("dataset_name",))
    split = take(draft, "dataset_test_split")
    evaluates = draft.place(("eval_strategy",)) if strategy in ("steps", "epoch") else None
    for name, steps in STRATEGIES.items():
        _rewrite_strategy(draft, name, steps)
    if draft.get(("load_best_model_at_end",)) is True and draft.has(("metric_for_best_model",)):
        record(
            draft,
            draft.place(("load_best_model_at_end",)),
            "load_best_model_at_end",
            "nothing (metric_for_best_model is used)",
        )
        draft.remove(("load_best_model_at_end",))
    if evaluates is not None and draft.has(("eval_strategy",)):
        draft.remove(("eval_strategy",))  # its result depends on data.eval, see below
    _settle_special_tokens(draft)
    _rewrite_warmup(draft)
    _rewrite_quantization(draft)
    _rewrite_precision(draft)
    dora = [(key, place) for key in DORA if draft.get(key) is True for place in [draft.place(key)] if draft.remove(key)]
    constant = [name for name in ("lr_scheduler", "lr_scheduler_type") if draft.values.get(name) == "constant"]
    for name in [name for name in draft.values if name in TOP_LEVEL and name not in (*SOURCE_KEYS, *TEMPLATE_KEYS)]:
        rewrite(draft, (name,), TOP_LEVEL[name])
    adapter = draft.values.get("adapter")
    for name in [name for name in adapter if name in IN_ADAPTER] if isinstance(adapter, dict) else ():
        rewrite(draft, ("adapter", name), IN_ADAPTER[name])
    for key, place in dora:
        _settle_dora(draft, dotted(key), place)
    if constant:
        _settle_constant(draft, constant[0])
    _write_test_split(draft, dataset, split, evaluates)
    for name, field in SOURCE_KEYS.items():
        _rewrite_source_key(draft, name, field)
    for name in TEMPLATE_KEYS:
        _rewrite_template(draft, name)


def _rewrite_quantization(draft: Draft) -> None:
    """load_in_4bit, load_in_8bit, quantization_bit and `adapter: qlora` -> model.quantization."""
    bits: dict[str, tuple[int, Place]] = {}
    for name, meaning in (("load_in_4bit", 4), ("load_in_8bit", 8), ("quantization_bit", None)):
        taken = take(draft, name)
        if taken is None:
            continue
        value, place = taken
        width = _bits(value, meaning)
        if width is None:
            expected = "must be true or false" if meaning else "must be 4 or 8"
            complain(draft, place, name, f"{expected}, not {show(value)}")
        elif width == 0:
            if draft.get(METHOD) == "qlora" and name == "load_in_4bit":
                complain(draft, place, name, "false contradicts adapter: qlora", "write adapter: lora")
            record(draft, place, name, "nothing (this value has no effect in tunekit)")
        else:
            bits[name] = (width, place)
    if draft.get(METHOD) == "qlora":
        place = draft.place(METHOD)
        draft.set(METHOD, "lora", place)
        record(draft, place, "adapter: qlora", "adapter.method: 'lora'")
        bits.setdefault("adapter: qlora", (4, place))
    _write_quantization(draft, bits)


def _write_quantization(draft: Draft, bits: dict[str, tuple[int, Place]]) -> None:
    kinds = [(name, found) for name in _FOUR_BIT_KINDS if (found := take(draft, name)) is not None]
    explicit = [name for name in bits if name != "adapter: qlora"]
    if len(explicit) > 1 or len({width for width, _ in bits.values()}) > 1:
        first, second = list(bits)[:2]
        what = f"{second} and {first} ({bits[first][1]}) contradict or repeat each other"
        complain(draft, bits[second][1], second, what, "keep one")
        return
    four_bit = next(iter(bits.values()))[0] == 4 if bits else False
    kind = "nf4"
    for name, (value, place) in kinds:
        if value not in ("nf4", "fp4") or not four_bit:
            what = f"must be nf4 or fp4, not {show(value)}" if four_bit else "the model is not loaded in 4 bits"
            complain(draft, place, name, what, "write model.quantization: nf4 or fp4")
        else:
            kind = value
            record(draft, place, name, f"model.quantization: {value!r}")
    for name in explicit or list(bits):
        write(draft, QUANTIZATION, kind if four_bit else "int8", bits[name][1], name)


def _rewrite_warmup(draft: Draft) -> None:
    """warmup_steps below 1 -> warmup_ratio: in transformers 5, such a number is a share of all steps."""
    steps, key = draft.get(("warmup_steps",)), ("warmup_ratio",)
    if isinstance(steps, float) and 0 < steps < 1 and not draft.has(key):
        draft.set(key, steps, draft.place(("warmup_steps",)))
        record(draft, draft.place(key), "warmup_steps", f"warmup_ratio: {steps:g} (a share of all steps)")
        draft.remove(("warmup_steps",))


def _rewrite_minimum_rate(draft: Draft) -> None:
    """Axolotl's cosine_min_lr_ratio -> the schedule cosine_with_min_lr and its min_lr_rate. Its other schedules do not
    read the key. Source: axolotl/utils/schedulers.py, _get_cosine_schedule_with_min_lr_lambda."""
    name = "cosine_min_lr_ratio"
    if (taken := take(draft, name)) is None:
        return
    value, place = taken
    if draft.get(("lr_scheduler",), "cosine") == "cosine":
        draft.set(("lr_scheduler",), "cosine_with_min_lr", draft.place(("lr_scheduler",)))
        write(draft, ("training", "scheduler_settings"), {"min_lr_rate": value}, place, name)
    else:
        record(draft, place, name, "nothing (only the schedule cosine reads it)")


def _rewrite_precision(draft: Draft) -> None:
    """bf16 and fp16 -> model.dtype. If both are false, model.dtype is float32, unless dtype is written."""
    precisions = {name: taken for name in PRECISION_KEYS if (taken := take(draft, name)) is not None}
    names = {("bf16", True): "bfloat16", ("fp16", True): "float16", ("bf16", "auto"): "auto"}
    chosen: list[tuple[str, str]] = []
    for name, (value, place) in precisions.items():
        if value is False:
            continue
        dtype = names.get((name, value)) if isinstance(value, bool | str) else None
        if dtype is None:
            complain(draft, place, name, f"must be true or false, not {show(value)}")
        else:
            chosen.append((name, dtype))
    if len(chosen) > 1:
        place = precisions["fp16"][1]
        complain(draft, place, "fp16", f"contradicts bf16 ({precisions['bf16'][1]})", "keep one")
        return
    written = next((name for name in ("dtype", "torch_dtype") if draft.get((name,)) is not None), None)
    if not chosen and "bf16" in precisions and written is None:
        chosen = [("bf16", "float32")]
    for name, (_, place) in precisions.items():
        dtype = dict(chosen).get(name)
        if dtype is None or (written is not None and dtype in ("auto", draft.get((written,)))):
            record(
                draft, place, name, f"nothing ({written or 'the other key'} decides)" if written or chosen else UNSET
            )
            continue
        if written is not None and draft.get((written,)) == "auto" and (found := take(draft, written)) is not None:
            record(draft, found[1], written, f"nothing ({name} decides)")
        write(draft, ("model", "dtype"), dtype, place, name)


def _settle_constant(draft: Draft, spelled: str) -> None:
    """Write warmup_ratio: 0 for the scheduler `constant`, which has a warm-up in tunekit but none in other tools."""
    place = draft.place(("training", "scheduler"))
    written = [name for name in ("warmup_ratio", "warmup_steps") if draft.has(("training", name))]
    if any(draft.get(("training", name)) for name in written):
        how = "write constant_with_warmup, or remove the warm-up"
        complain(draft, place, spelled, "the other tool's schedule `constant` ignores the warm-up", how)
    elif not written:
        write(draft, ("training", "warmup_ratio"), 0.0, place, f"{spelled}: constant")


def _settle_dora(draft: Draft, spelled: str, place: Place) -> None:
    """use_dora -> adapter.method: dora. In other tools, DoRA is an option of LoRA."""
    method = draft.get(METHOD, "lora")
    if method not in ("lora", "dora"):
        complain(draft, place, spelled, f"is an option of lora, but the method is {show(method)}", "remove one")
        return
    if draft.has(METHOD):
        draft.set(METHOD, "dora", draft.place(METHOD))
        record(draft, place, spelled, "adapter.method: 'dora'")
    else:
        write(draft, METHOD, "dora", place, spelled)


def _rewrite_source_key(draft: Draft, name: str, field: str) -> None:
    """Rewrite a key that applies to all training sources: write `field` into every source."""
    taken = take(draft, name)
    if taken is None:
        return
    value, place = taken
    sources = draft.get(TRAIN)
    if isinstance(sources, str):
        draft.wrap(TRAIN, "path")
        draft.wrap(TRAIN, 0)
    sources = draft.get(TRAIN)
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        complain(draft, place, name, "there are no training sources", "write the key under data.train")
    elif field == "columns" and value == "text":
        record(draft, place, name, "nothing (this value has no effect in tunekit)")
    else:
        for index, _ in enumerate(sources):
            theirs = {str(value): "text"} if field == "columns" else value
            if write(draft, (*TRAIN, index, field), theirs, place, name) and field == "max_rows":
                write(draft, (*TRAIN, index, "draw_seed"), None, place, name)  # the tool uses the first rows


def _rewrite_pissa(draft: Draft) -> None:
    """LLaMA-Factory's pissa_init and pissa_iter -> adapter.start. pissa_iter is 16 by default; -1: exact."""
    wanted, iterations = take(draft, "pissa_init"), take(draft, "pissa_iter")
    if wanted is not None and wanted[0] is True:
        count = 16 if iterations is None else iterations[0]
        start = "pissa" if count == -1 else {"method": "pissa", "iterations": count}
        write(draft, ("adapter", "start"), start, wanted[1], "pissa_init")
    for name, found in (("pissa_init", wanted), ("pissa_iter", iterations)):
        if found is not None and (name == "pissa_iter" or found[0] is not True):
            record(draft, found[1], name, "nothing (it needs pissa_init: true)")


def _settle_per_epoch(draft: Draft, name: str, ours: str, value: object, place: Place) -> None:
    """Replace evaluations or checkpoints per epoch by a note with the number of steps to write. The number cannot be
    computed here, because the number of rows is unknown.

    The setting is a problem only if evaluations decide when the run stops, or which checkpoint is best. Otherwise the
    result does not depend on it.
    """
    if value == 0 and not isinstance(value, bool):
        return record(draft, place, name, "nothing (0 means never)")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return complain(draft, place, name, f"must be a number above 0, not {show(value)}")
    sizes = [
        next((size for size in (draft.get((each,)) for each in names) if isinstance(size, int)), None)
        for names in (("micro_batch_size", "per_device_train_batch_size"), ("gradient_accumulation_steps",))
    ]
    if None in sizes:
        how = f"write {ours}: the steps of an epoch{'' if value == 1 else f' / {value:g}'} (`tunekit plan` counts them)"
    else:
        rows = prod(size for size in sizes if size is not None)
        count = "ROWS / {rows}" if value == 1 else "ROWS / {rows} / {value:g}"
        count = count.format(rows=rows, value=value)
        how = f"write {ours}: {count}, rounded up (a step has {rows} rows; `tunekit plan` counts ROWS)"
    best = ("early_stopping_patience", "metric_for_best_model", "load_best_model_at_end")
    if ours == "training.eval_steps" and any(draft.get((chosen,)) for chosen in best):
        return complain(
            draft,
            place,
            name,
            "tunekit evaluates by steps, not by epochs, and early stopping depends on the evaluations",
            how,
        )
    return record(draft, place, name, f"nothing (tunekit counts steps: {how})")


def _rewrite_strategy(draft: Draft, name: str, steps: str) -> None:
    """Rewrite the value `epoch` of eval_strategy or save_strategy. The other tools then ignore the number of steps."""
    if draft.get((name,)) == "epoch" and (taken := take(draft, name)) is not None:
        if (ignored := take(draft, steps)) is not None:
            record(draft, ignored[1], steps, f"nothing ({name}: epoch takes precedence)")
        _settle_per_epoch(draft, name, f"training.{steps}", 1, taken[1])


def _write_test_split(draft: Draft, dataset: object, split: tuple[Any, Place] | None, evaluates: Place | None) -> None:
    """Write data.eval for TRL, which evaluates on a split of dataset_name (default: test) if eval_strategy is set.

    `dataset`: the value of dataset_name, which must be a data set of the hub; `split`: the value of
    dataset_test_split; `evaluates`: the place of eval_strategy, None if it is off.
    """
    if evaluates is None:
        if split is not None:
            record(draft, split[1], "dataset_test_split", "nothing (eval_strategy is off)")
        return
    spelled = "eval_strategy" if split is None else "dataset_test_split"
    name, place = split or ("test", evaluates)
    hub = isinstance(dataset, str) and not (is_like_path(dataset) or dataset.endswith(DATA_ENDINGS))
    if split is None and draft.has(EVAL):
        record(draft, place, spelled, "nothing (data.eval is evaluated)")
    elif hub and not (Path(draft.file).parent / str(dataset)).exists():
        write(draft, EVAL, [{"path": dataset, "split": name}], place, spelled)
    elif split is None:
        record(draft, place, spelled, f"nothing (there are no evaluation rows: {EVAL_ROWS})")
    else:
        complain(draft, place, spelled, "is a split of a hub data set, but no data set is named", EVAL_ROWS)


def _settle_special_tokens(draft: Draft) -> None:
    """Remove special tokens that are equal to those of the base's tokenizer."""
    written = [key for key in SPECIAL_TOKENS if draft.get(key) is not None]
    own = file_of_base(draft, "tokenizer_config.json") if written else {}
    for key in written:
        token = own.get(key[-1])
        if draft.get(key) == (token.get("content") if isinstance(token, dict) else token):
            record(draft, draft.place(key), dotted(key), "nothing (the base's tokenizer has the same token)")
            draft.remove(key)


def file_of_base(draft: Draft, file: str) -> dict[str | int, Any]:
    """The content of a JSON file in the base's folder. Empty if the base is not a folder or the file cannot be read."""
    names = (("base_model",), ("model_name_or_path",), ("model_name",), ("model", "name_or_path"), ("model",))
    base = next((name for name in map(draft.get, names) if isinstance(name, str)), "")
    path = Path(draft.file).parent / os.path.expanduser(base) / file
    try:
        small = path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
        fields = json.loads(path.read_bytes()) if small else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _rewrite_template(draft: Draft, name: str) -> None:
    """Remove the name of a template if the base's tokenizer has that template; otherwise add a problem."""
    taken = take(draft, name)
    if taken is None:
        return
    value, place = taken
    base = str(draft.get(("model", "name_or_path"), draft.get(("model",), ""))).lower()
    base += f" {file_of_base(draft, 'config.json').get('model_type', '')}"
    bases = [known for start, known in TEMPLATES.items() if str(value).startswith(start)]
    if value == "tokenizer_default" or any(word in base for words in bases for word in words):
        record(draft, place, name, "nothing (the tokenizer's own template is used; `tunekit preview` shows it)")
    else:
        what = (
            f"tunekit does not know the template {show(value)}, and the base's tokenizer can have a different template"
        )
        complain(draft, place, name, what, "write data.chat_template: FILE, or remove it")


def _bits(value: object, meaning: int | None) -> int | None:
    """The number of bits that a value means: 4, 8, or 0 for no quantization; None for an invalid value. `meaning`: the
    number of bits that `true` means; None if the value is a number of bits."""
    if meaning is None:
        return value if value in (4, 8) and not isinstance(value, bool) else None
    return (meaning if value else 0) if isinstance(value, bool) else None
