"""Writes adapter folders in PEFT's format, with additional information in tunekit.json. A folder is written completely
or not at all.

peft loads such a folder without a warning, and the same adapter gives the same bytes.
"""

import contextlib
import copy
import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tunekit import __version__
from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.base import PeftConfig
from tunekit.adapters.folder.config import CONFIG_NAME, FACTS_NAME, FORMAT_VERSION, TEMPLATE_NAME, TENSORS_NAME
from tunekit.adapters.folder.diffusers_file import DIFFUSERS_NAME, diffusers_header, diffusers_tensors
from tunekit.adapters.folder.peft_models import read_as_experts
from tunekit.adapters.folder.targets import concrete_pattern, concrete_targets
from tunekit.adapters.method import saved_modules
from tunekit.adapters.module_names import all_modules, base_modules, named_copies, parameter_names, plain_entries
from tunekit.adapters.tokens import written_indices
from tunekit.errors import AdapterError
from tunekit.files import durable
from tunekit.files.tensors import write_tensors
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.records import JsonObject

OUR_FILES = {CONFIG_NAME, TENSORS_NAME, FACTS_NAME, TEMPLATE_NAME, DIFFUSERS_NAME}
TensorsFile = tuple[str, Mapping[str, str]]  # file name, and the entries of its header
PEFT_FILE: TensorsFile = (TENSORS_NAME, {"format": "pt"})


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
    of_pipeline: bool = False,
) -> int:
    """Write the folder completely or not at all. Returns its size in bytes.

    `chat_template`: the text of a template that replaces the base's template and is saved with the adapter.
    `objective`: the training objective, with values that later use of the adapter needs, such as labels.
    `of_pipeline`: whether the base is a diffusion pipeline, whose LoRA is written to diffusers' file instead of PEFT's.
    Raises: AdapterError if the folder contains files that do not belong to an adapter; ResourceError, RunFolderError.
    """
    folder = Path(os.path.abspath(folder))
    plain = copy.copy(attached)
    form = (attached.settings, attached.targets, attached.layers)
    plain.settings, plain.targets, plain.layers = attached.method.written_form(form)
    name, path = base_names(base_name, folder)
    config = peft_config(plain)
    config |= {"base_model_name_or_path": name, "revision": revision, "task_type": task_type}
    base = {
        "path": path,
        "fingerprint": base_fingerprint,
        "revision": revision,
        "dtype": base_dtype,
        "quantization": quantization,
        "double_quantization": double_quantization,
    }
    tensors = {part.file_key(name): tensor for part in plain.parts() for name, tensor in part.file_tensors().items()}
    file = PEFT_FILE
    if of_pipeline and plain.method.in_diffusers_file:
        file = DIFFUSERS_NAME, diffusers_header(plain.method.peft.claims, plain.settings, plain.targets)
        tensors = diffusers_tensors(tensors)
    return write_adapter_folder(folder, tensors, config, attached.settings, base, chat_template, objective, file)


def write_adapter_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: PeftConfig,
    settings: AdapterSettings,
    base: Mapping[str, Any],
    chat_template: str | None = None,
    objective: Mapping[str, Any] | None = None,
    file: TensorsFile = PEFT_FILE,
) -> int:
    """Write tensors (by file key), PEFT's configuration and tunekit.json, completely or not at all. Returns their size
    in bytes.

    `base`: path, fingerprint, revision, dtype, quantization and double_quantization of the base.
    `file`: the name of the tensor file, and the metadata in its header.
    Raises: as save_adapter_folder.
    """
    with _replacing(folder) as temporary:
        tensor_bytes, digest = write_tensors(temporary / file[0], tensors, file[1])
        files = {
            file[0]: {"bytes": tensor_bytes, "sha256": digest},
            CONFIG_NAME: _write(temporary / CONFIG_NAME, durable.json_bytes(config)),
        }
        if chat_template is not None:
            files[TEMPLATE_NAME] = _write(temporary / TEMPLATE_NAME, chat_template.encode())
        facts = {
            "format_version": FORMAT_VERSION,
            "tunekit_version": __version__,
            "settings": settings.model_dump(mode="json", exclude={"init_from"}),  # a local path
            "base": dict(base),
            "files": files,
            **({} if objective is None else {"objective": dict(objective)}),
        }
        written = [*files.values(), _write(temporary / FACTS_NAME, durable.json_bytes(facts))]
    return sum(file["bytes"] for file in written)


def _write(path: Path, content: bytes) -> JsonObject:
    """Write a file, flushed to the disk; returns its size and hash."""
    with durable.DurableFile(path) as file:
        file.write(content)
    return {"bytes": file.size_bytes, "sha256": file.sha256}


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yields a new folder to fill. After the `with` block it replaces `folder`; if the block fails, it is removed."""
    _refuse_foreign_files(folder)
    _remove_leftovers(folder)
    temporary = durable.temporary_name(folder)
    durable.make_folder(temporary)
    try:
        yield temporary
        durable.sync(temporary)
        durable.replace_folder(temporary, folder)
    except BaseException:
        with contextlib.suppress(Exception):
            if durable.is_real_folder(temporary):
                durable.remove_tree(temporary)
        raise


def peft_config(attached: AttachedAdapter) -> PeftConfig:
    """All fields of PEFT's configuration, with explicit targets. Rank and alpha patterns give the same values in any
    order of their keys."""
    settings, targets = attached.settings, attached.targets
    config = attached.method.peft.write(settings)
    modules = all_modules(attached.net)
    named = named_copies(base_modules(attached.net), saved_modules(settings))
    layers = [target.name for target in targets if target.kind != "parameter"]
    experts = read_as_experts(attached.net, layers) if attached.method.peft.takes_experts else set()
    written = {target.name: f"{target.name}.weight" if target.name in experts else target.name for target in targets}
    if "target_modules" in config:
        chosen = [name for name in sorted(attached.copies) if name not in named]
        names = chosen if attached.method.only_copies else [name for name in layers if name not in experts]
        config["target_modules"] = concrete_targets(names, list(modules))
        config |= {"exclude_modules": None} if "exclude_modules" in config else {}
    if attached.copies and config.get("modules_to_save"):
        config["modules_to_save"] = plain_entries(named, modules)
    config |= {key: None for key in ("layers_to_transform", "layers_pattern") if key in config}
    config |= {"modules_to_save": None} if config.get("modules_to_save") == [] else {}
    if "target_parameters" in config:
        fused = [written[target.name] for target in targets if target.name in experts or target.kind == "parameter"]
        names = parameter_names(modules)  # also of towers, in which PEFT searches too
        config["target_parameters"] = concrete_targets(fused, names, depths=(1, 2)) if fused else None
    if "trainable_token_indices" in attached.method.peft.fields:
        config["trainable_token_indices"] = written_indices(settings, attached.tokens)
    for key, default, resolved in (
        ("rank_pattern", "r", {written[target.name]: target.r for target in targets}),
        ("alpha_pattern", "alpha", {written[target.name]: target.alpha for target in targets}),
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


def base_names(base_name: str, folder: Path) -> tuple[str, str | None]:
    """The base's name for PEFT (a hub id or an absolute path), and the path of a local base relative to the adapter
    folder.

    PEFT resolves a relative path from its working directory; the relative path finds a base that was moved together
    with the adapter folder.
    """
    base = Path(base_name).expanduser()
    if not base.is_absolute():
        return base_name, None
    return str(base.resolve()), relative_to(base.resolve(), folder.resolve())


def _refuse_foreign_files(folder: Path) -> None:
    """Raises: AdapterError if replacing the folder would remove files that do not belong to an adapter."""
    if not os.path.lexists(folder):
        return
    if not durable.is_real_folder(folder):
        raise AdapterError("exists and is not a folder", "choose another folder", file=str(folder))
    foreign = sorted(set(os.listdir(folder)) - OUR_FILES)
    if foreign:
        raise AdapterError(f"contains other files ({foreign[0]})", "choose another folder", file=str(folder))


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished folders that killed processes have left. A folder that contains other files is kept."""
    for other in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.part-*")):
        if durable.is_real_folder(other) and set(os.listdir(other)) <= OUR_FILES:
            durable.remove_tree(other)
