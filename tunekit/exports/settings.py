"""Settings of a base that a program ignores. With such settings, the export would compute something else."""

from collections.abc import Iterable, Mapping
from typing import Any

from tunekit.errors import Problem
from tunekit.model.base_spec import default_config
from tunekit.model.storage.llama_cpp import Configuration

Ignored = tuple[str, object, str]  # the setting, its value, and the values that the program takes


def complete_config(config: Configuration) -> Configuration:
    """The configuration of the text model. Settings that config.json leaves out have the defaults of transformers."""
    text = config["text_config"] if isinstance(config.get("text_config"), Mapping) else {}
    kind = str(text.get("model_type") or config.get("model_type"))
    return {**config, **text, **default_config(kind, text or config)}


def complete_gemma4(text: dict[str, Any]) -> None:
    """Add the keys of Gemma 4's layers with full attention to its text_config. transformers writes them as
    per_layer_config, which other programs do not read."""
    if "per_layer_config" in text:
        full: Mapping[str, Any] = next(iter(text["per_layer_config"].values()), {})
        text.setdefault("global_head_dim", full.get("head_dim", text["head_dim"]))
        text.setdefault("num_global_key_value_heads", full.get("num_key_value_heads"))


def ignored_problems(program: str, ignored: Iterable[Ignored]) -> list[Problem]:
    """A problem for each ignored setting."""
    return [
        Problem(f"{name} is {value} in this base, and {program} computes with {taken}", "choose another --to")
        for name, value, taken in ignored
    ]
