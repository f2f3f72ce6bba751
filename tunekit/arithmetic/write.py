"""Writes an adapter that was computed from other adapter folders, and copies the information about the base from these
folders."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tunekit.adapters.base import PeftConfig
from tunekit.adapters.folder.config import TEMPLATE_NAME, AdapterConfig, tensors_path
from tunekit.adapters.folder.diffusers_file import DIFFUSERS_NAME, diffusers_header, diffusers_tensors
from tunekit.adapters.folder.fields import json_value
from tunekit.adapters.folder.write import PEFT_FILE, TensorsFile, base_names, write_adapter_folder
from tunekit.arithmetic.lora_folder import FACTORS, PREFIX, LoraFolder
from tunekit.arithmetic.low_rank import LowRank
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError
from tunekit.files.untrusted import printable, read_small
from tunekit.formats.labels import SINGLE_LABEL
from tunekit.records import Target
from tunekit.targets.target import base_override

BASE_FACTS = {"dtype": "base_dtype", "quantization": "quantization", "double_quantization": "double_quantization"}


@dataclass(frozen=True)
class BaseFacts:
    """The information about the base that the new folder contains. `notes`: messages about differences between the
    source folders. `in_diffusers_file`: whether they are LoRAs of a pipeline, which diffusers reads only from its own
    file."""

    name: str | None  # a hub id, or an absolute path
    revision: str | None = None
    fingerprint: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    double_quantization: bool | None = None
    task_type: str | None = None
    chat_template: str | None = None
    objective: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    in_diffusers_file: bool = False


def base_of(configs: Sequence[AdapterConfig], named: str | None) -> BaseFacts:
    """The information about the common base of these adapters. `named`: the value of --base, which replaces the name in
    the adapters.

    Raises: AdapterError if the adapters have different bases or tasks.
    """
    first, notes = configs[0], []
    for other in configs[1:]:
        _refuse_other_base(first, other, named)
    tasks = {config.task_type for config in configs} - {None}
    if len(tasks) > 1:
        what = f"the adapters are for different tasks: {' and '.join(sorted(map(str, tasks)))}"
        raise AdapterError(what, "combine adapters of one task", key="task_type")
    known: dict[str, Any] = {}
    for fact, own in BASE_FACTS.items():
        values = {getattr(config, own) for config in configs} - {None}
        known[fact] = values.pop() if len(values) == 1 else None
        if len(values) > 0:
            notes.append(f"the adapters were trained on bases with different values of {fact}")
    files = [config.folder / TEMPLATE_NAME for config in configs]
    templates = [read_small(file).decode("utf-8", "replace") if file.exists() else None for file in files]
    if len(set(templates)) > 1:
        notes.append(f"the adapters were trained with different chat templates; the template of {first.folder} is used")
    return BaseFacts(
        name=base_override(named).get("name_or_path") or _located(first),
        revision=None if named else next((config.revision for config in configs if config.revision), None),
        fingerprint=next((config.base_fingerprint for config in configs if config.base_fingerprint), None),
        **known,
        task_type=next(iter(tasks), None),
        chat_template=templates[0],
        objective=_objective_of(configs),
        notes=tuple(notes),
        in_diffusers_file=any(tensors_path(config.folder).name == DIFFUSERS_NAME for config in configs),
    )


def _objective_of(configs: Sequence[AdapterConfig]) -> Mapping[str, Any] | None:
    """The objective of the first folder that states an objective. For several folders, its thresholds are left out,
    because they fit only the scores of one adapter."""
    objective = next((config.objective for config in configs if config.objective), None)
    if objective is None or len(configs) == 1:
        return objective
    return {name: value for name, value in objective.items() if name != "thresholds"}


def refuse_other_labels(configs: Sequence[AdapterConfig]) -> None:
    """Raises: AdapterError if two of the adapters have different labels, labels in a different order, or scores with
    different meanings."""
    named = [(config, config.objective) for config in configs if config.objective and "labels" in config.objective]
    for config, objective in named[1:]:
        first, expected = named[0]
        labels, expected_labels = objective["labels"], expected["labels"]
        if labels != expected_labels:
            what = f"has the labels {printable(labels)}, but {first.folder} has {printable(expected_labels)}"
            raise AdapterError(what, "combine only adapters with the same labels", file=str(config.folder))
        meaning, expected_meaning = (each.get("problem_type", SINGLE_LABEL) for each in (objective, expected))
        if meaning != expected_meaning:
            what = f"was trained for {printable(meaning)}, but {first.folder} for {printable(expected_meaning)}"
            raise AdapterError(what, "combine only adapters of the same problem type", file=str(config.folder))


def _refuse_other_base(first: AdapterConfig, other: AdapterConfig, named: str | None) -> None:
    if first.base_fingerprint and other.base_fingerprint:
        if first.base_fingerprint != other.base_fingerprint:
            what = f"was trained on a different base than {first.folder} (their fingerprints differ)"
            raise AdapterError(what, "use only adapters of the same base", file=str(other.folder))
        return
    here, there = (_located(first), first.revision), (_located(other), other.revision)
    if named is None and any(a and b and a != b for a, b in zip(here, there, strict=True)):
        what = (
            f"was trained on {there[0]} (revision {there[1]}), but {first.folder} was trained on {here[0]} "
            f"(revision {here[1]})"
        )
        raise AdapterError(what, "if these are the same base, name it with --base", file=str(other.folder))


def _located(config: AdapterConfig) -> str | None:
    """The hub id of the base, or its absolute path, even if it does not exist."""
    name = config.base_name_or_path
    return config.base_location() or (name and os.path.abspath(config.folder / Path(name).expanduser()))


def write_without_base(
    output: Path,
    base: BaseFacts,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    fields: PeftConfig,
    file: TensorsFile = PEFT_FILE,
) -> int:
    """Write an adapter folder without reading the base. Returns the folder's size in bytes.

    `fields`: PEFT's fields that do not follow from the settings. `file`: as in write_adapter_folder.
    """
    name, path = (None, None) if base.name is None else base_names(base.name, output)
    peft, settings = config.method.peft, config.settings
    written = {**peft.write(settings), **fields, "base_model_name_or_path": name, "revision": base.revision}
    written |= {"task_type": base.task_type}
    facts = {"path": path} | {fact: getattr(base, fact) for fact in ("fingerprint", "revision", *BASE_FACTS)}
    present = {key: None if value == [] else value for key, value in written.items() if key not in peft.absent}
    if output.exists():
        output.rmdir()  # empty, as checked
    output.parent.mkdir(parents=True, exist_ok=True)
    ready = {key: tensor.contiguous() for key, tensor in tensors.items()}
    return write_adapter_folder(output, ready, present, settings, facts, base.chat_template, base.objective, file)


def write_lora(output: Path, base: BaseFacts, like: LoraFolder, updates: Mapping[str, LowRank]) -> int:
    """Write a plain LoRA with these updates. Returns its size in bytes.

    `like`: the adapter whose settings and other tensors are written; its target_modules are used if it has the same
    layers. alpha is chosen so that programs that ignore patterns scale all layers correctly.
    """
    scaled, alpha = _with_one_scaling(updates)
    ranks = {name: update.rank for name, update in scaled.items()}
    rank = max(ranks.values())
    written = {name: f"{name}.weight" if name in like.parameters else name for name in sorted(scaled)}
    others = {f"^{re.escape(written[name])}": ranks[name] for name in written if ranks[name] != rank}
    alphas = {key: float(own if alpha is None else alpha) for key, own in others.items() if alpha is None}
    changed: dict[str, Any] = {
        "r": rank,
        "alpha": float(rank) if alpha is None else alpha,
        "rank_pattern": others,
        "alpha_pattern": alphas,
        "use_rslora": False,
        "init_from": None,
        "target_parameters": tuple(name for layer, name in written.items() if layer in like.parameters),
    }
    target_modules = like.target_modules
    if scaled.keys() != like.updates.keys() or not target_modules:
        target_modules = sorted(scaled.keys() - like.parameters)
        changed |= {"exclude_modules": None, "layers_to_transform": (), "layers_pattern": None}
    changed["target_modules"] = target_modules if isinstance(target_modules, str) else tuple(sorted(target_modules))
    config = replace(like.config, settings=like.config.settings.model_copy(update=changed))
    fields = {"target_modules": json_value(changed["target_modules"]), "fan_in_fan_out": like.fan_in_fan_out}
    tensors = {key: value for name, update in scaled.items() for key, value in _keys(name, update).items()}
    tensors |= like.rest
    if not base.in_diffusers_file:
        return write_without_base(output, base, config, tensors, fields)
    layers = [_target(name, update, update.rank if alpha is None else alpha) for name, update in scaled.items()]
    file = DIFFUSERS_NAME, diffusers_header({}, config.settings, layers)
    return write_without_base(output, base, config, diffusers_tensors(tensors), fields, file)


def _target(name: str, update: LowRank, alpha: float) -> Target:
    (rows, columns), count = update.shape, update.a.numel() + update.b.numel()
    return Target(name, "linear", columns, rows, count, update.rank, float(alpha))


def _with_one_scaling(updates: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], float | None]:
    """The updates, and the alpha that fits all of them, if they have equal ranks and scalings and this alpha is a whole
    number.

    Otherwise alpha is None, and each update is multiplied by its scaling, so that alpha = rank is correct.
    """
    kinds = Counter((update.rank, update.scaling) for update in updates.values())
    rank, scaling = next(iter(kinds))
    if len(kinds) == 1 and (rank * scaling).is_integer() and scaling > 0:
        return dict(updates), rank * scaling
    return {name: update.folded() for name, update in updates.items()}, None


def _keys(name: str, update: LowRank) -> Tensors:
    """The factors of an update by file key, float32."""
    suffixes = {factor: suffix for suffix, (factor, embedding) in FACTORS.items() if embedding == update.embedding}
    return {f"{PREFIX}{name}{suffixes['A']}": update.a.float(), f"{PREFIX}{name}{suffixes['B']}": update.b.float()}
