"""Translations of other tools' values to tunekit's values.

A translation is a function of the value. It returns NOTHING if the value has no effect in tunekit, and raises NotExact
if there is no exact translation.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, Final

from tunekit.recipe.reading.suggest import show

NOTHING: Final = object()
Translate = Callable[[object], object]

DATA_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz")
KERNEL_PLUGINS = ("LigerPlugin", "CutCrossEntropyPlugin", "KernelsPlugin")


class NotExact(Exception):
    """A value has no exact translation. `what`: the setting that would be lost; `how`: how to mend it."""

    def __init__(self, what: str, how: str = "") -> None:
        super().__init__(what)
        self.what, self.how = what, how


def same(value: object) -> object:
    """The unchanged value, for keys that differ only in name."""
    return value


def one_of(choices: dict[Any, Any], how: str = "") -> Translate:
    """A translation that looks up values in a table. In this table, true and false are not equal to 1 and 0."""

    def translate(value: object) -> object:
        for known, ours in choices.items():
            if value == known and type(value) is type(known):
                return ours
        raise NotExact(f"{show(value)} has no exact translation (known: {_names(choices)})", how)

    return translate


def switch(ours: object) -> Translate:
    """A translation of a boolean key: true becomes `ours`, false has no effect."""
    return one_of({True: ours, False: NOTHING})


def exactly(*known: object, how: str = "") -> Translate:
    """A translation that accepts only these values, which have no effect."""

    def translate(value: object) -> object:
        if any(value == each and type(value) is type(each) for each in known):
            return NOTHING
        raise NotExact(f"{show(value)} has no exact translation (known: {_names(known)})", how)

    return translate


def _names(known: Iterable[object]) -> str:
    return ", ".join(str(each).lower() if isinstance(each, bool) else str(each) for each in known)


def these(*choices: str | bool) -> Translate:
    """A translation that accepts only these values and returns them unchanged."""
    return one_of({choice: choice for choice in choices})


def always_so(value: object) -> object:
    """Translate any value to NOTHING: the setting changes no result."""
    return NOTHING


def lost(why: str, how: str = "") -> Translate:
    """A translation that accepts only false, 0 and empty values, because tunekit has no such setting."""

    def translate(value: object) -> object:
        if value in (0, "", [], {}):
            return NOTHING
        raise NotExact(f"is a key of another tool and would be lost: {why}", how)

    return translate


def tokens_of_padding(value: object) -> object:
    """Translate Axolotl's special_tokens. The padding token changes nothing, because padding is masked."""
    others = [name for name, token in value.items() if name != "pad_token" and token] if isinstance(value, dict) else []
    if others:
        raise NotExact(
            f"{others[0]} is taken from the base's tokenizer", "remove the key if the tokenizer's value is the same"
        )
    return NOTHING


def plugins(value: object) -> object:
    """Translate Axolotl's plugins. Plugins that only replace kernels change no result."""
    others = [name for name in value or () if not str(name).endswith(KERNEL_PLUGINS)] if isinstance(value, list) else []
    if others or not isinstance(value, list):
        raise NotExact(f"{show(others[0] if others else value)} would be lost: plugins are not run", "remove it")
    return NOTHING


def model_class(value: object) -> object:
    """Translate Axolotl's model_type. A causal language model needs no key, because sft always loads one."""
    if str(value).endswith("ForCausalLM"):
        return NOTHING
    raise NotExact(f"{show(value)} is not a causal language model", "write model.family")


def turned_off_by_zero(value: object) -> object:
    """Translate max_grad_norm: 0 means no clipping, which is null in tunekit."""
    return None if value == 0 and not isinstance(value, bool) else value


def unset_by_negative(value: object) -> object:
    """Translate max_steps: -1 means "not set" in the other tools."""
    return NOTHING if value == -1 and not isinstance(value, bool) else value


def stage(value: object) -> object:
    """Translate LLaMA-Factory's stage: rm is a reward model, and pt (pre-training) is sft on plain text."""
    return {"rm": "reward", "pt": "sft"}.get(value, value) if isinstance(value, str) else value


def negated(value: object) -> object:
    """Translate a boolean key with the opposite meaning."""
    return not value if isinstance(value, bool) else value


def evaluation_share(value: object) -> object:
    """Translate val_set_size: a fraction of the rows, or 0 for no evaluation. A number of rows has no translation."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if value == 0:
        return NOTHING
    if value >= 1:
        raise NotExact("is a number of rows, not a fraction", "write a fraction below 1, or data.eval: FILE")
    return value


def lora_targets(value: object) -> object:
    """Translate LLaMA-Factory's lora_target: `all`, or names separated by commas."""
    if not isinstance(value, str):
        return value
    if value in ("all", "all-linear"):
        return "all-linear"
    return [name.strip() for name in value.split(",") if name.strip()]


def trackers(value: object) -> object:
    """Translate report_to: a name, a list of names, or none."""
    if value in ("none", ["none"]):
        return []
    return [value] if isinstance(value, str) else value


def best_metric(value: object) -> object:
    """Translate metric_for_best_model: loss and eval_loss become eval.loss."""
    if not isinstance(value, str):
        return value
    return f"eval.{value.removeprefix('eval_')}"


def dataset_files(value: object) -> object:
    """Translate file names in LLaMA-Factory's `dataset`. datasets.py has already replaced the other names."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise NotExact("must be a file name", "write data.train: FILE")
    return [{"path": name} for name in names]


def dataset_list(value: object) -> object:
    """Translate the `datasets` of Axolotl and TRL: a list of mappings, which sources.py has already translated."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise NotExact("must be a list of {path: ..., type: ...}", "write data.train: FILE")
    return value


def mapping_text(value: object) -> object:
    """Translate a mapping that may be written as JSON text, as transformers reads it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise NotExact(f"{show(value)} is not JSON", 'write {"min_lr_rate": 0.1}') from None


def mapping_of(item: dict[str, Any], key: str) -> dict[Any, Any]:
    """The mapping under this key; empty if the key is absent. Raises: NotExact if the value is not a mapping."""
    value = item.get(key) or {}
    if not isinstance(value, dict):
        raise NotExact(f"{key} must be a mapping, not {show(value)}", "mend the value")
    return value
