"""Values of other tools -> tunekit's values, exactly or not at all.
NOTHING: the value changes nothing here. NotExact: what would be lost.
"""

from collections.abc import Callable
from typing import Any, Final

from tunekit.recipe.reading.suggest import show

NOTHING: Final = object()
Translate = Callable[[object], object]

DATA_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz")
_DATASET_TYPES = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chat_template": "chat", "completion": "text"}
_DATASET_TYPES |= dict.fromkeys(("chat_template.default", "chatml.ultra"), "preference")  # Axolotl's
_DATASET_TYPES |= dict.fromkeys(("chatml.intel", "chatml.argilla", "chatml.argilla_chat"), "auto")  # pairs, or of kto
_DATASET_KEYS = (
    *("path", "type", "ds_type", "split", "field", "field_messages", "field_chosen", "field_rejected", "revision"),
    *("message_field_role", "message_field_content", "message_property_mappings", "roles", "trust_remote_code"),
)
_SPEAKERS = {"chat": ("role", "content"), "sharegpt": ("from", "value")}  # keys of a message, of either format
_ROLES = {"user": ("user", "human"), "assistant": ("assistant", "gpt"), "system": ("system",), "tool": ("tool",)}


KERNEL_PLUGINS = ("LigerPlugin", "CutCrossEntropyPlugin", "KernelsPlugin")


class NotExact(Exception):
    """A value that has no exact translation: what is lost, and how to mend it."""

    def __init__(self, what: str, how: str = "") -> None:
        super().__init__(what)
        self.what, self.how = what, how


def same(value: object) -> object:
    """Only the name differs."""
    return value


def one_of(choices: dict[Any, Any], how: str = "") -> Translate:
    """A table of values; true and false are never taken for 1 and 0."""

    def translate(value: object) -> object:
        for known, ours in choices.items():
            if value == known and type(value) is type(known):
                return ours
        names = ", ".join(str(known).lower() if isinstance(known, bool) else str(known) for known in choices)
        raise NotExact(f"{show(value)} has no exact translation (known: {names})", how)

    return translate


def switch(ours: object) -> Translate:
    """A switch that is one of our values if it is on, and changes nothing if it is off."""
    return one_of({True: ours, False: NOTHING})


def exactly(*known: object, how: str = "") -> Translate:
    """Only these values, which change nothing."""
    return one_of(dict.fromkeys(known, NOTHING), how)


def these(*choices: str | bool) -> Translate:
    """Only these values, which stay as they are."""
    return one_of({choice: choice for choice in choices})


def always_so(value: object) -> object:
    """Any value: the setting changes no result here."""
    return NOTHING


def lost(why: str, how: str = "") -> Translate:
    """Only false (or empty) can be translated: tunekit has nothing like it."""

    def translate(value: object) -> object:
        if value is False or value == "" or value == [] or value == {}:
            return NOTHING
        raise NotExact(f"is a key of another tool and would be lost: {why}", how)

    return translate


def tokens_of_padding(value: object) -> object:
    """Axolotl's special_tokens: which token pads changes nothing, for padding is masked."""
    others = [name for name, token in value.items() if name != "pad_token" and token] if isinstance(value, dict) else []
    if others:
        raise NotExact(f"{others[0]} is taken from the base's tokenizer", "remove it if it is the same there")
    return NOTHING


def plugins(value: object) -> object:
    """Axolotl's plugins: those of kernels alone change no result."""
    others = [name for name in value or () if not str(name).endswith(KERNEL_PLUGINS)] if isinstance(value, list) else []
    if others or not isinstance(value, list):
        raise NotExact(f"{show(others[0] if others else value)} would be lost: plugins are not run", "remove it")
    return NOTHING


def model_class(value: object) -> object:
    """Axolotl's model_type: a causal language model is what sft loads anyway."""
    if str(value).endswith("ForCausalLM"):
        return NOTHING
    raise NotExact(f"{show(value)} is no causal language model", "write model.family")


def turned_off_by_zero(value: object) -> object:
    """max_grad_norm 0 is no clipping: null here."""
    return None if value == 0 and not isinstance(value, bool) else value


def unset_by_negative(value: object) -> object:
    """max_steps -1 is unset there."""
    return NOTHING if value == -1 and not isinstance(value, bool) else value


def stage(value: object) -> object:
    """LLaMA-Factory's name of a reward model is rm; pre-training is sft on plain text."""
    return {"rm": "reward", "pt": "sft"}.get(value, value) if isinstance(value, str) else value


def negated(value: object) -> object:
    """A switch with the opposite sense."""
    return not value if isinstance(value, bool) else value


def evaluation_share(value: object) -> object:
    """val_set_size: a fraction of the rows; 0 is none; a number of rows has no translation."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if value == 0:
        return NOTHING
    if value >= 1:
        raise NotExact("is a number of rows", "write a fraction below 1, or data.eval: FILE")
    return value


def lora_targets(value: object) -> object:
    """LLaMA-Factory: `all`, or names separated by commas."""
    if not isinstance(value, str):
        return value
    if value in ("all", "all-linear"):
        return "all-linear"
    return [name.strip() for name in value.split(",") if name.strip()]


def trackers(value: object) -> object:
    """report_to: a name, a list of names, none."""
    if value in ("none", ["none"]):
        return []
    return [value] if isinstance(value, str) else value


def best_metric(value: object) -> object:
    """metric_for_best_model: loss and eval_loss are eval.loss."""
    if not isinstance(value, str):
        return value
    return f"eval.{value.removeprefix('eval_')}"


def dataset_files(value: object) -> object:
    """LLaMA-Factory's `dataset`: names of files; those of dataset_info.json are sources already (datasets.py)."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise NotExact("must be a file name", "write data.train: FILE")
    return [{"path": name} for name in names]


def dataset_list(value: object) -> object:
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
    _read_messages(item, source)
    messages = {"preference": "conversations", "sharegpt": "conversations"}.get(source.get("format", ""), "messages")
    fields = {"field": "text", "field_messages": messages, "field_chosen": "chosen", "field_rejected": "rejected"}
    columns = {str(item[key]): field for key, field in fields.items() if item.get(key) not in (None, field)}
    return {**source, **({"columns": columns} if columns else {})}


def _read_messages(item: dict[str, Any], source: dict[str, Any]) -> None:
    """Axolotl's keys and roles of messages: those of our two formats. Raises: NotExact for others."""
    mapped = mapping_of(item, "message_property_mappings")
    keys = tuple(item.get(f"message_field_{name}") or mapped.get(name, name) for name in ("role", "content"))
    if keys not in _SPEAKERS.values() or set(mapped) - {"role", "content"}:
        raise NotExact(f"messages with {' and '.join(map(str, keys))} are read by no format", "rename their keys")
    if source.get("format") == "chat" and keys == _SPEAKERS["sharegpt"]:
        source["format"] = "sharegpt"
    for role, names in mapping_of(item, "roles").items():
        listed = names if isinstance(names, list) else [] if names is None else [names]
        others = [name for name in listed if name not in _ROLES.get(role, ())]
        if others:
            raise NotExact(f"the role {show(others[0])} for {role} has no translation", "rename it in the rows")


def mapping_of(item: dict[str, Any], key: str) -> dict[Any, Any]:
    """The mapping under this key, empty where there is none. Raises: NotExact for anything else."""
    value = item.get(key) or {}
    if not isinstance(value, dict):
        raise NotExact(f"{key} must be a mapping, not {show(value)}", "mend it")
    return value
