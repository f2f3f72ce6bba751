"""Reads and strictly checks the configuration of an adapter folder that tunekit or peft wrote: adapter_config.json and
tunekit.json. No tensor is read."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunekit.adapters.base import AdapterPart, PeftConfig
from tunekit.adapters.folder.diffusers_file import DIFFUSERS_NAME, peft_keys
from tunekit.adapters.method import Method, all_methods
from tunekit.errors import AdapterError, ModelError
from tunekit.files.tensors import TensorEntry, read_tensor_header
from tunekit.files.untrusted import parse_json, printable, read_small, same_value, sha256_of
from tunekit.model.storage.inspection import fingerprint
from tunekit.model.storage.source import find_source
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.recipe.bases.paths import is_like_path, last_name
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
FACTS_NAME = "tunekit.json"
TEMPLATE_NAME = "chat_template.jinja"  # exists only if the adapter was trained with a different template
HEAD_TASKS, HEADS = ("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")  # PEFT trains the heads of these tasks
FETCH = "copy the adapter's folder again"
FORMAT_VERSION = 1  # of tunekit.json


def is_adapter(place: Path) -> bool:
    """Whether the folder contains an adapter's configuration file. False for an unreadable folder."""
    return os.path.exists(place / CONFIG_NAME)


def adapter_in(path: Path) -> Path | None:
    """The adapter folder at a path: the folder itself or, for a run folder, its subfolder `adapter`. None if neither is
    an adapter folder."""
    return next((place for place in (path, path / "adapter") if is_adapter(place)), None)


@dataclass(frozen=True)
class AdapterConfig:
    """The configuration of an adapter folder. Values that come from tunekit.json are None in a folder written by
    peft."""

    folder: Path
    method: Method
    settings: AdapterSettings
    base_name_or_path: str | None  # as in the file: a hub id, or a path, relative to the folder if it is not absolute
    revision: str | None
    task_type: str | None
    base_path: str | None = None  # relative to the folder
    base_fingerprint: str | None = None
    base_dtype: str | None = None
    quantization: str | None = None
    double_quantization: bool | None = None
    files: tuple[tuple[str, str], ...] = ()  # name, sha256
    objective: Mapping[str, Any] | None = None  # its method and facts
    fields: PeftConfig = field(default_factory=dict)  # PEFT's, as in the file

    @property
    def file(self) -> str:
        """The configuration's path, for messages."""
        return str(self.folder / CONFIG_NAME)

    @property
    def low_rank(self) -> LowRankSettings:
        """The settings, typed as the settings of a method of the LoRA family."""
        assert isinstance(self.settings, LowRankSettings)
        return self.settings

    def changed_files(self) -> list[str]:
        """Names of the files that were changed since tunekit wrote them, according to tunekit.json."""
        return [name for name, digest in self.files if sha256_of(self.folder / name) != digest]

    def check_files(self) -> None:
        """Raises: AdapterError if a file of the folder was changed after tunekit wrote it."""
        for name in self.changed_files():
            how = f"restore the file, or delete {FACTS_NAME} to accept the changed folder"
            raise AdapterError("is different from the file that tunekit wrote", how, file=str(self.folder / name))

    def base_location(self) -> str | None:
        """The location of the base: a path that the configuration names, a folder of the same name nearby, or a hub id.
        None if unknown.

        If several paths exist, the path whose fingerprint equals the base's fingerprint is preferred. A nearby folder
        is returned only if its fingerprint is equal.
        """
        name = self.base_name_or_path
        if not name:
            return None
        is_path = is_like_path(name)
        named = [self.folder / Path(path).expanduser() for path in (self.base_path, name) if path]
        nearby = [parent / last_name(name) for parent in self.folder.resolve().parents[:3]]
        if self.base_fingerprint is not None:
            for place in [*named, *nearby]:
                if place.exists() and _fingerprint_of(place) == self.base_fingerprint:
                    return str(place.resolve())
        existing = next((str(place.resolve()) for place in named if place.exists()), None)
        return existing or (None if is_path else name)


def _fingerprint_of(place: Path) -> str | None:
    try:
        return fingerprint(find_source(ModelSection(name_or_path=str(place)), weights=True))
    except ModelError:
        return None


def read_adapter_config(folder: Path, method: Method | None = None, instead: PeftConfig | None = None) -> AdapterConfig:
    """Read and check both configuration files and the header of the tensor file. By default, the file's peft_type
    determines `method`.

    `instead`: values that replace values of the file, for a caller that interprets the file's values itself.
    Raises: AdapterError that names everything missing, malformed, truncated or unsupported. No tensor is read.
    """
    folder = Path(folder)
    path, file_fields = folder / CONFIG_NAME, read_fields(folder)
    fields = {**file_fields, **(instead or {})}
    method = method or method_of(fields, str(path))
    config = AdapterConfig(
        folder=folder,
        method=method,
        settings=method.peft.read(fields, str(path)),
        base_name_or_path=_text(fields, "base_model_name_or_path", path),
        revision=_text(fields, "revision", path),
        task_type=_text(fields, "task_type", path),
        **_tunekit_facts(folder),
        fields=file_fields,
    )
    refuse_pickle(folder)
    shapes = {name: entry.shape for name, entry in adapter_header(tensors_path(folder)).items()}
    settings = config.settings
    if config.task_type in HEAD_TASKS and "modules_to_save" in type(settings).model_fields:
        settings = _with_heads(settings, shapes)
    return replace(config, settings=method.peft.stored(settings, shapes) if method.peft.stored else settings)


def _with_heads(settings: AdapterSettings, keys: Iterable[str]) -> AdapterSettings:
    """The settings, with modules_to_save extended by the heads that the file contains. Early releases of PEFT, such as
    0.10, do not list these heads."""
    saved: tuple[str, ...] = tuple(getattr(settings, "modules_to_save", ()))
    stored = {head for head in HEADS for key in keys if key.startswith(f"{AdapterPart.file_prefix}{head}.")}
    return settings.model_copy(update={"modules_to_save": (*saved, *sorted(stored.difference(saved)))})


def read_fields(folder: Path) -> PeftConfig:
    """The fields of adapter_config.json, unchecked.

    Raises: AdapterError.
    """
    if not folder.is_dir() or folder.is_symlink():
        raise AdapterError(
            "is not an adapter folder", "name a folder that contains adapter_config.json", file=str(folder)
        )
    path = folder / CONFIG_NAME
    return parse_json(read_small(path), str(path))


def method_of(fields: PeftConfig, file: str) -> Method:
    """The method with the file's peft_type. If several methods fit, it is the method with the most distinguishing
    fields in the file (PeftSide.claims)."""
    wanted = fields.get("peft_type")
    methods = [method for method in all_methods() if method.peft.peft_type]
    fitting = [
        method
        for method in methods
        if method.peft.peft_type == wanted
        and method.read_as is None
        and all(name in fields and same_value(fields[name], value) for name, value in method.peft.claims.items())
    ]
    if not fitting:
        known = ", ".join(sorted({method.peft.peft_type for method in methods}))
        raise AdapterError(
            f"adapters of type {printable(wanted)} are not supported", f"supported: {known}", file=file, key="peft_type"
        )
    return max(fitting, key=lambda method: len(method.peft.claims))


def _text(fields: PeftConfig, name: str, path: Path) -> str | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > 4096 or "\0" in value):
        raise AdapterError("must be a text", "correct it in this file", file=str(path), key=name)
    return value or None


def _tunekit_facts(folder: Path) -> JsonObject:
    """The values of tunekit.json; empty if the file does not exist."""
    path = folder / FACTS_NAME
    if not path.exists() and not path.is_symlink():
        return {}
    facts = parse_json(read_small(path), str(path))
    version = facts.get("format_version")
    if type(version) is not int or version < 1:
        raise AdapterError("has no format_version", "delete this file to read the folder as peft does", file=str(path))
    if version > FORMAT_VERSION:
        raise AdapterError(f"has format version {version}", "update tunekit", file=str(path))
    base, files = facts.get("base"), facts.get("files")
    if (
        not isinstance(base, dict)
        or not isinstance(files, dict)
        or CONFIG_NAME not in files
        or not {TENSORS_NAME, DIFFUSERS_NAME} & set(files)
        or set(files) - {TEMPLATE_NAME, DIFFUSERS_NAME, CONFIG_NAME, TENSORS_NAME}
    ):
        raise AdapterError(
            "is malformed: base or files", "delete this file to read the folder as peft does", file=str(path)
        )
    double = base.get("double_quantization")
    return {
        "base_path": _text(base, "path", path),
        "base_fingerprint": _text(base, "fingerprint", path),
        "base_dtype": _text(base, "dtype", path),
        "quantization": _text(base, "quantization", path),
        "double_quantization": double if isinstance(double, bool) else None,
        "objective": facts["objective"] if isinstance(facts.get("objective"), dict) else None,
        "files": tuple((name, _sha256(entry, path)) for name, entry in sorted(files.items())),
    }


def _sha256(entry: object, path: Path) -> str:
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    if not isinstance(digest, str):
        raise AdapterError("is malformed: files without sha256", FETCH, file=str(path))
    return digest


def tensors_path(folder: Path) -> Path:
    """The path of the folder's tensor file: PEFT's file, or diffusers' file for the LoRA of a pipeline."""
    peft_file, diffusers_file = folder / TENSORS_NAME, folder / DIFFUSERS_NAME
    return diffusers_file if not os.path.lexists(peft_file) and os.path.lexists(diffusers_file) else peft_file


def adapter_header(path: Path) -> dict[str, TensorEntry]:
    """The header of an adapter's tensor file: PEFT's key -> shape, type and position of the tensor.

    Raises: AdapterError.
    """
    header = read_tensor_header(path)
    return peft_keys(path, header) if path.name == DIFFUSERS_NAME else header


def refuse_pickle(folder: Path) -> None:
    """Raises: AdapterError if the tensors are only in a pickle, which is never read."""
    try:
        tensors_path(folder).lstat()
    except OSError as error:
        pickle = folder / PICKLE_NAME
        if pickle.exists() or pickle.is_symlink():
            raise AdapterError(
                "is a pickle, which can run code when it is read; tunekit reads safetensors only",
                "convert the file to safetensors in a sandbox",
                file=str(pickle),
            ) from error
        raise AdapterError(f"contains no {TENSORS_NAME}", FETCH, file=str(folder)) from error
