"""Makes a model folder readable by older programs: transformers 4, mlx-lm, Ollama.

transformers 5 writes only `rope_parameters`. A reader that knows only the older keys would silently use its default
base frequency and compute other logits.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunekit.model.storage.source import read_json

# keys of rope_parameters that older configurations have at the top level
TOP_LEVEL_KEYS = ("rope_theta", "partial_rotary_factor")
OTHER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# Models whose layer types differ: the older keys for the base frequencies of full and of sliding attention. Older
# programs know no other such models.
BY_LAYER_TYPE = {
    "gemma3": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),  # a single frequency; only full attention is scaled
}
# The only keys that transformers 4 accepts in these models' rope_scaling; None: all of rope_parameters
ONLY_TYPE = {
    **dict.fromkeys(("phi3", "phi4_multimodal"), ("short_factor", "long_factor")),
    **dict.fromkeys(("chameleon", "olmo", "olmo2", "phimoe"), None),
}
SAME_TOKENIZER = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # the name that transformers 4 knows


def make_portable(folder: Path) -> None:
    """Add the older keys to the folder's config.json, and write tokenizer_config.json in a form that all versions
    read."""
    for name, change in (("config.json", with_older_keys), ("tokenizer_config.json", _older_tokenizer)):
        path = folder / name
        written = read_json(path) if path.is_file() else {}
        changed = change(written)
        if changed != written:
            path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, including its parts, with `torch_dtype` in addition to `dtype`, and `rope_theta`,
    `rope_scaling` and similar keys in addition to `rope_parameters`."""
    parts = {
        name: with_older_keys(value)
        for name, value in config.items()
        if isinstance(value, Mapping) and name.endswith("_config") and name != "quantization_config"
    }
    dtype = {"torch_dtype": config["dtype"]} if isinstance(config.get("dtype"), str) else {}
    return {**config, **parts, **dtype, **_older_rope(config)}


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The older keys for `rope_parameters`; empty if `rope_scaling` is set, which transformers 5 reads first."""
    rope, kind = config.get("rope_parameters"), str(config.get("model_type"))
    if not isinstance(rope, Mapping) or config.get("rope_scaling"):
        return {}
    if "rope_theta" in rope:
        names = next((names for start, names in OTHER_NAMES.items() if kind.startswith(start)), {})
        older = {key: rope[key] for key in TOP_LEVEL_KEYS if key in rope}
        return {**older, **{names[key]: value for key, value in older.items() if key in names}, **_scaling(rope, kind)}
    keys = next((keys for start, keys in BY_LAYER_TYPE.items() if kind.startswith(start)), None)
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if keys is None or not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
        return {}
    scaling = _scaling(full, kind) if keys[0] == "rope_theta" else {}  # ModernBERT would apply it to both
    older = {keys[0]: full.get("rope_theta"), **scaling}
    return older if keys[1] is None else {**older, keys[1]: sliding.get("rope_theta")}


def _scaling(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """`rope_scaling`: None, or its type under both common names, and its numbers."""
    numbers = {key: value for key, value in rope.items() if key not in (*TOP_LEVEL_KEYS, "rope_type", "type")}
    scaling_type = rope.get("rope_type", "default")
    if scaling_type == "default" and not numbers:
        return {"rope_scaling": None}
    if kind not in ONLY_TYPE:
        return {"rope_scaling": {"rope_type": scaling_type, "type": scaling_type, **numbers}}
    known = ONLY_TYPE[kind] or tuple(numbers)
    return {"rope_scaling": {"type": scaling_type, **{key: numbers[key] for key in known if key in numbers}}}


def _older_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's configuration with the class and the list of special tokens that every version reads."""
    portable = {**config}
    if portable.get("tokenizer_class") in SAME_TOKENIZER:
        portable["tokenizer_class"] = SAME_TOKENIZER[portable["tokenizer_class"]]
    if isinstance(portable.get("extra_special_tokens"), list):  # transformers 4 reads a mapping under this name
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    return portable
