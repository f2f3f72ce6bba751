"""Writes adapter folders in PEFT's format, whole or not at all, with tunekit's own facts beside them in tunekit.json.

An attached adapter goes in; a folder that peft loads without a warning comes out, the same bytes each time.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tunekit import __version__
from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.config import CONFIG_NAME, FACTS_NAME, FORMAT_VERSION, TEMPLATE_NAME, TENSORS_NAME
from tunekit.adapters.folder.targets import concrete_pattern, concrete_targets
from tunekit.adapters.method import WrittenForm
from tunekit.adapters.module_names import base_modules, named_copies, parameter_names, plain_entries
from tunekit.adapters.tokens import written_indices
from tunekit.errors import AdapterError
from tunekit.files import durable
from tunekit.files.tensors import write_tensors

OUR_FILES = {CONFIG_NAME, TENSORS_NAME, FACTS_NAME, TEMPLATE_NAME}


def save_adapter_folder(
    attached: AttachedAdapter,
    folder: Path,
    *,
    base_name: str,
    base_fingerprint: str | None,
    revision: str | None,
    task_type: str | None = "CAUSAL_LM",
    base_dtype: str | None = None,
    quantization: str = "none",
    double_quantization: bool = False,
    chat_template: str | None = None,
    objective: Mapping[str, Any] | None = None,
) -> int:
    """Write the folder whole or not at all; returns its bytes. A local base is named relative to the folder.

    `chat_template`: the text of one other than the base's own; it then belongs to the adapter.  `objective`: for what
    it was trained, and what that must know when it is used.

    Raises: AdapterError where the folder holds files that are not an adapter's; ResourceError, RunFolderError.
    """
    folder = Path(os.path.abspath(folder))
    form = attached.method.written_form(WrittenForm(attached.settings, attached.targets, attached.layers))
    plain = copy.copy(attached)
    plain.settings, plain.targets, plain.layers = form.settings, form.targets, form.layers
    config = peft_config(plain)
    config |= {"base_model_name_or_path": portable(base_name, folder), "revision": revision, "task_type": task_type}
    base = {
        "fingerprint": base_fingerprint,
        "revision": revision,
        "dtype": base_dtype,
        "quantization": quantization,
        "double_quantization": double_quantization,
    }
    tensors = {part.file_key(name): tensor for part in plain.parts() for name, tensor in part.exported().items()}
    return write_adapter_folder(folder, tensors, config, attached.settings, base, chat_template, objective)


def write_adapter_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    settings: Any,
    base: Mapping[str, Any],
    chat_template: str | None = None,
    objective: Mapping[str, Any] | None = None,
) -> int:
    """Write tensors by file key, PEFT's configuration and our own facts, whole or not at all; returns their bytes.

    `base`: fingerprint, revision, dtype, quantization and double_quantization of the base.
    Raises: as save_adapter_folder.
    """
    _refuse_foreign_files(folder)
    _remove_left_overs(folder)
    temporary = durable.temporary_name(folder)
    durable.make_folder(temporary)
    try:
        size_bytes = _write_files(temporary, tensors, config, settings, base, chat_template, objective)
        durable.sync_folder(temporary)
        durable.replace_folder(temporary, folder)
    except BaseException:
        with contextlib.suppress(Exception):
            if durable.is_real_folder(temporary):
                durable.remove_tree(temporary)
        raise
    return size_bytes


def _write_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    settings: Any,
    base: Mapping[str, Any],
    chat_template: str | None,
    objective: Mapping[str, Any] | None,
) -> int:
    """The three files, and the template if there is one, each flushed to the disk; returns their bytes."""
    tensor_bytes, digest = write_tensors(folder / TENSORS_NAME, tensors, {"format": "pt"})
    config_bytes, config_digest = _write_json(folder / CONFIG_NAME, config)
    files = {
        TENSORS_NAME: {"bytes": tensor_bytes, "sha256": digest},
        CONFIG_NAME: {"bytes": config_bytes, "sha256": config_digest},
    }
    template_bytes = 0
    if chat_template is not None:
        with durable.DurableFile(folder / TEMPLATE_NAME) as file:
            file.write(chat_template.encode())
        template_bytes = file.size_bytes
        files[TEMPLATE_NAME] = {"bytes": template_bytes, "sha256": file.sha256}
    facts = {
        "format_version": FORMAT_VERSION,
        "tunekit_version": __version__,
        "settings": settings.model_dump(mode="json", exclude={"init_from"}),  # a path of this machine
        "base": dict(base),
        "files": files,
        **({} if objective is None else {"objective": dict(objective)}),
    }
    facts_bytes, _ = _write_json(folder / FACTS_NAME, facts)
    return tensor_bytes + config_bytes + facts_bytes + template_bytes


def _write_json(path: Path, value: Mapping[str, Any]) -> tuple[int, str]:
    with durable.DurableFile(path) as file:
        file.write(durable.json_bytes(value))
    return file.size_bytes, file.sha256


def peft_config(attached: AttachedAdapter) -> dict[str, Any]:
    """Every field of PEFT's configuration, with concrete targets and patterns that mean the same in any order."""
    settings, targets = attached.settings, attached.targets
    config = attached.method.peft.write(settings)
    named = named_copies(base_modules(attached.net), attached.method.copies(settings))
    if "target_modules" in config:
        chosen = [name for name in sorted(attached.copies) if name not in named]
        names = chosen if attached.method.only_copies else [t.name for t in targets if t.kind != "parameter"]
        config["target_modules"] = concrete_targets(names, list(base_modules(attached.net)))
        config |= {"exclude_modules": None} if "exclude_modules" in config else {}
    if attached.copies and config.get("modules_to_save"):
        config["modules_to_save"] = plain_entries(named, base_modules(attached.net))
    config |= {key: None for key in ("layers_to_transform", "layers_pattern") if key in config}
    config |= {"modules_to_save": None} if config.get("modules_to_save") == [] else {}
    if "target_parameters" in config:
        fused = [target.name for target in targets if target.kind == "parameter"]
        config["target_parameters"] = concrete_targets(fused, parameter_names(attached.net)) if fused else None
    if "trainable_token_indices" in attached.method.peft.fields:
        config["trainable_token_indices"] = written_indices(settings, attached.tokens)
    for key, default, resolved in (
        ("rank_pattern", "r", {target.name: target.r for target in targets}),
        ("alpha_pattern", "alpha", {target.name: target.alpha for target in targets}),
    ):
        if attached.method.peft.fields.get(key, ("",))[0] == key:
            config[key] = concrete_pattern(getattr(settings, key), resolved, getattr(settings, default))
    if "fan_in_fan_out" in config:
        config["fan_in_fan_out"] = any(target.kind == "conv1d" for target in targets)
    resolve = attached.method.peft.resolve
    config |= resolve(settings, targets, config) if resolve else {}
    for part in attached.parts():
        config |= part.file_fields()
    return {name: value for name, value in config.items() if name not in attached.method.peft.absent}


def portable(base_name: str, folder: Path) -> str:
    """A hub id as it is; a local base relative to the adapter folder, so that no user's path leaves the machine."""
    base = Path(base_name).expanduser()
    if not base.is_absolute() and not base.exists():
        return base_name
    relative = os.path.relpath(base.resolve(), folder.resolve())
    return relative if relative.startswith("..") else os.path.join(".", relative)


def _refuse_foreign_files(folder: Path) -> None:
    """Only an adapter's own files are ever replaced."""
    if not os.path.lexists(folder):
        return
    if not durable.is_real_folder(folder):
        raise AdapterError("is in the way", "choose another folder", file=str(folder))
    foreign = sorted(set(os.listdir(folder)) - OUR_FILES)
    if foreign:
        raise AdapterError(f"holds files of others ({foreign[0]})", "choose another folder", file=str(folder))


def _remove_left_overs(folder: Path) -> None:
    """Unfinished folders of killed processes; one that holds anything else is none of ours."""
    for other in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.part-*")):
        if durable.is_real_folder(other) and set(os.listdir(other)) <= OUR_FILES:
            durable.remove_tree(other)
