"""Values of other tools -> tunekit's values, exactly or not at all.

Comes in: one value as Axolotl, LLaMA-Factory, TRL or PEFT write it.  Goes out: our value, or NOTHING where the value
says what is so anyway.  Raises: NotExact, naming what would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tunekit.recipe.reading.suggest import show

NOTHING: Final = object()
Translate = Callable[[Any], Any]

DATA_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz")
_DATASET_TYPES = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chat_template": "chat", "completion": "text"}
_DATASET_TYPES |= dict.fromkeys(("chat_template.default", "chatml.ultra"), "preference")  # Axolotl's
_DATASET_TYPES |= dict.fromkeys(("chatml.intel", "chatml.argilla", "chatml.argilla_chat"), "auto")  # pairs, or of kto
_DATASET_KEYS = ("path", "type", "ds_type", "split", "field", "field_messages", "revision", "trust_remote_code")


class NotExact(Exception):
    """A value that has no exact translation: what is lost, and how to mend it."""

    def __init__(self, what: str, how: str = "") -> None:
        super().__init__(what)
        self.what, self.how = what, how


def same(value: object) -> Any:
    """Only the name differs."""
    return value


def one_of(choices: dict[Any, Any], how: str = "") -> Translate:
    """A table of values; true and false are never taken for 1 and 0."""

    def translate(value: object) -> Any:
        for known, ours in choices.items():
            if value == known and type(value) is type(known):
                return ours
        names = ", ".join(str(known).lower() if isinstance(known, bool) else str(known) for known in choices)
        raise NotExact(f"{show(value)} has no exact translation (known: {names})", how)

    return translate


def always_so(value: object) -> Any:
    """Any value: the setting changes no result here."""
    return NOTHING


def lost(why: str, how: str = "") -> Translate:
    """Only false (or empty) can be translated: tunekit has nothing like it."""

    def translate(value: object) -> Any:
        if value is False or value == "" or value == [] or value == {}:
            return NOTHING
        raise NotExact(f"is a key of another tool and would be lost: {why}", how)

    return translate


def turned_off_by_zero(value: object) -> Any:
    """max_grad_norm 0 is no clipping: null here."""
    return None if value == 0 and not isinstance(value, bool) else value


def unset_by_negative(value: object) -> Any:
    """max_steps -1 is unset there."""
    return NOTHING if value == -1 and not isinstance(value, bool) else value


def stage(value: object) -> Any:
    """LLaMA-Factory's name of a reward model is rm."""
    return "reward" if value == "rm" else value


def negated(value: object) -> Any:
    """A switch with the opposite sense."""
    return not value if isinstance(value, bool) else value


def evaluation_share(value: object) -> Any:
    """val_set_size: a fraction of the rows; 0 is none; a number of rows has no translation."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if value == 0:
        return NOTHING
    if value >= 1:
        raise NotExact("is a number of rows", "write a fraction below 1, or data.eval: FILE")
    return value


def lora_targets(value: object) -> Any:
    """LLaMA-Factory: `all`, or names separated by commas."""
    if not isinstance(value, str):
        return value
    if value in ("all", "all-linear"):
        return "all-linear"
    return [name.strip() for name in value.split(",") if name.strip()]


def trackers(value: object) -> Any:
    """report_to: a name, a list of names, none."""
    if value in ("none", ["none"]):
        return []
    return [value] if isinstance(value, str) else value


def best_metric(value: object) -> Any:
    """metric_for_best_model: loss and eval_loss are eval.loss."""
    if not isinstance(value, str):
        return value
    return f"eval.{value.removeprefix('eval_')}"


def dataset_files(value: object) -> Any:
    """LLaMA-Factory's `dataset` names entries of its own dataset_info.json; only file names mean something here."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise NotExact("must be a file name", "write data.train: FILE")
    for name in names:
        if not name.endswith(DATA_ENDINGS):
            raise NotExact(
                f"'{name}' is no file name; dataset_info.json is not read", "write data.train: FILE or hub name"
            )
    return [{"path": name} for name in names]


def dataset_list(value: object) -> Any:
    """Axolotl's and TRL's `datasets`: a list of {path, type, ...}."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise NotExact("must be a list of {path: ..., type: ...}", "write data.train: FILE")
    return [_dataset(item) for item in value]


def _dataset(item: dict[str, Any]) -> dict[str, Any]:
    for key, found in item.items():
        if key not in _DATASET_KEYS and found not in (None, False):
            raise NotExact(f"'{key}' would be lost", "write the source under data.train")
    if item.get("trust_remote_code"):
        raise NotExact("a data set's own code is never run", "convert it to JSONL")
    source = {key: item[key] for key in ("path", "split", "revision") if item.get(key) is not None}
    kind, ending = item.get("type"), item.get("ds_type")
    endings = DATA_ENDINGS if ending == "json" else (f".{ending}",)
    if ending is not None and not str(item.get("path")).endswith(endings):
        raise NotExact(f"ds_type {ending} does not follow from the file name", "rename the file")
    if kind is not None:
        if not isinstance(kind, str) or kind not in _DATASET_TYPES:
            raise NotExact(f"the type {show(kind)} has no exact translation", f"known: {', '.join(_DATASET_TYPES)}")
        source["format"] = _DATASET_TYPES[kind]
    for key, field in (("field", "text"), ("field_messages", "messages")):
        if item.get(key) not in (None, field):
            source["columns"] = {str(item[key]): field}
    return source
