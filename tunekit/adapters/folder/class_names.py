"""Renames adapters between the classes of one model. Some tools load a composite model through its text class, so that
their adapters lack the name of the language model: servers that load the class in config.json apply none of them."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from tunekit.adapters.folder.config import CONFIG_NAME, TENSORS_NAME, adapter_header, read_fields, tensors_path
from tunekit.adapters.folder.expected import PREFIX
from tunekit.adapters.module_names import all_modules
from tunekit.files.durable import json_bytes
from tunekit.files.tensors import read_tensor, write_tensors
from tunekit.model.families.structure import base_name
from tunekit.model.parts import is_composite

# The names of the language model in transformers' classes, today and before version 4.52, longest first.
LANGUAGE_MODELS = ("model.language_model", "language_model.model", "model.text_model", "model")
HEADS = ("language_model.lm_head", "lm_head")
TEXT_CLASS = ("model", "lm_head")
NAMED = (
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern"),
    "trainable_token_indices",
)  # PEFT's fields that contain names of modules
Renames = Mapping[str, str]  # name of a module in the folder -> its name in the net


def may_need_renames(folder: Path, *, composite: bool) -> bool:
    """Whether the names of the folder's tensors may be those of another class than the base's, without reading the
    base. `composite`: whether the base is a composite model."""
    places = LANGUAGE_MODELS if composite else LANGUAGE_MODELS[:-1]
    starts = tuple(f"{PREFIX}{place}." for place in places)
    return any(key.startswith(starts) for key in adapter_header(tensors_path(folder)))


def renames_for(net: nn.Module, head_name: str | None, folder: Path) -> Renames:
    """The renames with which all tensors of the folder belong to modules of the net; empty if they do already, or if no
    renames help."""
    keys = [key.removeprefix(PREFIX) for key in adapter_header(tensors_path(folder)) if key.startswith(PREFIX)]
    owners = {name for name, module in all_modules(net).items() if module._parameters}
    strange = [key for key in keys if not _has_owner(key, owners)]
    if not strange or not any(key.startswith((*LANGUAGE_MODELS, *HEADS)) for key in strange):
        return {}
    heads = dict.fromkeys(HEADS, head_name or "")
    for place in LANGUAGE_MODELS:
        renames = {place: base_name(net), **heads}
        if all(_has_owner(_renamed_key(key, renames), owners) for key in strange):
            return {old: new for old, new in renames.items() if old != new}
    return {}


def text_class_renames(net: nn.Module, head_name: str | None) -> Renames:
    """The renames from the class of a composite model to its text class. Empty for other models."""
    own = (base_name(net), head_name or "")
    return dict(zip(own, TEXT_CLASS, strict=True)) if is_composite(net) else {}


def _has_owner(key: str, owners: set[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:end]) in owners for end in range(1, len(parts)))


def _renamed_key(key: str, renames: Renames) -> str:
    old = next((old for old in renames if key.startswith(f"{old}.")), None)
    return key if old is None else f"{renames[old]}{key.removeprefix(old)}"


def write_renamed(folder: Path, output: Path, net: nn.Module, renames: Renames) -> None:
    """Write PEFT's two files of an adapter folder with other names of modules."""
    path, tensors = tensors_path(folder), {}
    for key, entry in adapter_header(path).items():
        name = f"{PREFIX}{_renamed_key(key.removeprefix(PREFIX), renames)}" if key.startswith(PREFIX) else key
        tensors[name] = read_tensor(path, entry)
    inner = {name for name, _ in net.get_submodule(base_name(net)).named_children()}
    fields = read_fields(folder)
    fields = {key: _renamed(value, renames, inner) if key in NAMED else value for key, value in fields.items()}
    output.mkdir(parents=True)
    write_tensors(output / TENSORS_NAME, tensors, {"format": "pt"})
    (output / CONFIG_NAME).write_bytes(json_bytes(fields))


def _renamed(value: object, renames: Renames, inner: set[str]) -> object:
    """The value of a field with all names of modules renamed: in texts, in lists and in the keys of mappings."""
    if isinstance(value, str):
        return _renamed_text(value, renames, inner)
    if isinstance(value, list):
        return [_renamed(item, renames, inner) for item in value]
    if isinstance(value, dict):
        return {_renamed_text(key, renames, inner): item for key, item in value.items()}
    return value


def _renamed_text(text: str, renames: Renames, inner: set[str]) -> str:
    """A name, or a regular expression for names, with the names of the language model and of the head replaced.
    `inner`: the names of modules directly inside the language model."""
    after = rf"(?=(\\?)\.(?:{'|'.join(map(re.escape, sorted(inner)))})\b)"
    for old, new in renames.items():
        pattern = r"(?<![\w.\\])" + r"\\?\.".join(old.split(".")) + (after if old not in HEADS else r"(?![\w])()")

        def replaced(match: re.Match[str], new: str = new) -> str:
            return new.replace(".", rf"{match[1]}.")

        text, count = re.subn(pattern, replaced, text)
        if count:
            break
    return text
