"""Summarises an adapter folder of any method, without its base. Faulty folders are summarised too.

Files are read as strictly as for loading, but faults are reported instead of raised.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tunekit.adapters.folder.config import (
    AdapterConfig,
    adapter_header,
    read_adapter_config,
    read_fields,
    refuse_pickle,
    tensors_path,
)
from tunekit.adapters.method import all_methods
from tunekit.arithmetic.lora_folder import FACTORS, PREFIX, Resolved, Scalings, plain_lora_method
from tunekit.arithmetic.low_rank import LowRank
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError
from tunekit.files.tensors import DTYPES, NAMES, TensorEntry, iterate_tensors
from tunekit.files.untrusted import printable
from tunekit.records import JsonObject, bytes_text

BASE_TENSORS = ("weight", "bias", "base_layer", "trainable_tokens_delta")  # trained copies, biases and rows
LISTED = 12  # lists with more entries are printed as their length; the JSON output has all entries
NUMBERS = {name for name, dtype in DTYPES.items() if dtype.is_floating_point}  # dtypes that have norms and NaN


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of the file. `norm`: the Frobenius norm; None for integers and for values that are not finite."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float | None
    zero: bool  # whether all elements are 0
    not_finite: int  # number of elements that are NaN or infinite


@dataclass(frozen=True)
class LayerSummary:
    """The part of the adapter that belongs to one module. `update_norm`: the norm of s B A, for LoRA only."""

    name: str
    rank: int | None
    parameters: int
    norm: float | None
    update_norm: float | None


@dataclass(frozen=True)
class AdapterSummary:
    """The content of the report that `tunekit adapter show` prints. `faults`: the reasons why tunekit refuses to load
    the folder; empty if there are none."""

    folder: str
    method: str
    peft_type: str
    base: str | None
    revision: str | None
    fingerprint: str | None
    ranks: dict[int, int]  # rank -> number of layers
    settings: JsonObject
    parameters: int
    tensor_bytes: int  # size of the tensor file
    tensors: list[TensorSummary]
    layers: list[LayerSummary]
    dead: list[str]
    not_finite: list[str]
    faults: list[str] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, object]:
        """The summary in a few lines: label -> value."""
        ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in self.ranks.items())
        return {
            "method": f"{self.method} (peft type {self.peft_type})",
            "base": self.base or "not named",
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "ranks": ranks or None,
            "settings": self._settings_text() or None,
            "parameters": self.parameters,
            "file": f"{bytes_text(self.tensor_bytes)}, {len(self.tensors)} tensors",
        }

    def _settings_text(self) -> str:
        """The settings that are not empty or false, as text. For long lists and mappings only the length is given."""
        written = {key: value for key, value in self.settings.items() if value not in (None, [], {}, "", False)}
        short = {
            key: f"({len(value)})" if isinstance(value, list | dict) and len(value) > LISTED else value
            for key, value in written.items()
        }
        return ", ".join(f"{key} {value}" for key, value in short.items() if key != "method")


def summarise_adapter(folder: Path) -> AdapterSummary:
    """The summary of an adapter folder. Each tensor is read once.

    Raises: AdapterError if the folder does not exist, or its files are not JSON and safetensors files.
    """
    fields = read_fields(folder)
    refuse_pickle(folder)
    path = tensors_path(folder)
    header = adapter_header(path)
    config, faults = _configuration(folder)
    tensors: list[TensorSummary] = []
    factors: dict[str, Tensors] = {}  # module -> A and B of LoRA
    for name, tensor in iterate_tensors(path, header):
        tensors.append(_summarise(name, header[name], tensor))
        suffix = next((suffix for suffix in FACTORS if name.endswith(suffix)), None)
        if suffix and tensor.dim() == 2:
            factors.setdefault(name.removeprefix(PREFIX).removesuffix(suffix), {})[FACTORS[suffix][0]] = tensor
    try:
        if config is not None and getattr(config.settings, "target_parameters", None):
            factors = _without_experts(factors, config)
        norms, ranks = _update_norms(factors, config), _setting_ranks(tensors, config)
    except AdapterError as error:  # ambiguous patterns
        norms, ranks = {}, Counter()
        faults += [str(problem) for problem in error.problems]
    layers = _layers(tensors, factors, norms)
    not_finite = [tensor.name for tensor in tensors if tensor.not_finite]
    faults += [f"{name} contains NaN or infinity" for name in not_finite]
    settings = config.settings.model_dump(mode="json", exclude={"init_from"}) if config else {}
    return AdapterSummary(
        folder=str(folder),
        method=settings.get("method", printable(str(fields.get("peft_type", "unknown")).lower())),
        peft_type=printable(str(fields.get("peft_type"))),
        base=config.base_name_or_path if config else _text(fields.get("base_model_name_or_path")),
        revision=config.revision if config else _text(fields.get("revision")),
        fingerprint=config.base_fingerprint if config else None,
        ranks=dict(sorted((Counter(layer.rank for layer in layers if layer.rank is not None) or ranks).items())),
        settings=settings,
        parameters=sum(math.prod(t.shape) for t in tensors if t.dtype in NUMBERS),
        tensor_bytes=path.stat().st_size,
        tensors=tensors,
        layers=layers,
        dead=[tensor.name for tensor in tensors if tensor.zero],
        not_finite=not_finite,
        faults=faults,
    )


def _configuration(folder: Path) -> tuple[AdapterConfig | None, list[str]]:
    """The configuration, and messages about files that were changed after tunekit wrote them. If the configuration is
    refused: None, and the reasons."""
    try:
        config = read_adapter_config(folder)
        changed = config.changed_files()
    except AdapterError as error:
        return None, [str(problem) for problem in error.problems]
    return config, [f"{name} is not the file that tunekit wrote" for name in changed]


def _summarise(name: str, entry: TensorEntry, tensor: Tensor) -> TensorSummary:
    dtype = NAMES[entry.dtype]
    if dtype not in NUMBERS:
        return TensorSummary(name, dtype, entry.shape, None, False, 0)
    values = tensor.to(torch.float64)
    not_finite = values.numel() - int(torch.isfinite(values).sum())
    norm = None if not_finite else float(torch.linalg.vector_norm(values))
    zero = values.numel() > 0 and not bool(values.any())
    return TensorSummary(name, dtype, entry.shape, norm, zero, not_finite)


@cache
def _own_names() -> frozenset[str]:
    """The first components of all tensor names of the methods that contain a dot: `lora_A` for `lora_A.weight`."""
    names = [name for method in all_methods() for name in method.tensors]
    return frozenset({"base_layer"} | {name.partition(".")[0] for name in names if "." in name})


def split_name(key: str) -> tuple[str, str]:
    """Splits a key of the file into the name of the base's module and the tensor's name. The tensor names of the
    methods show where the module's name ends."""
    parts = key.removeprefix(PREFIX).removeprefix("base_model.").split(".")
    first = next((index for index, part in enumerate(parts) if part in _own_names()), len(parts) - 1)
    return ".".join(parts[:first]), ".".join(parts[first:])


def _layers(
    tensors: list[TensorSummary], factors: Mapping[str, Mapping[str, Tensor]], norms: Mapping[str, float]
) -> list[LayerSummary]:
    """The summaries of all modules. Tensors that belong to no module (shared tensors, prompts) are listed under their
    own names."""
    by_module: dict[str, list[TensorSummary]] = {}
    for tensor in tensors:
        module, own = split_name(tensor.name)
        by_module.setdefault(module or own, []).append(tensor)
    layers = []
    for name, held in sorted(by_module.items(), key=lambda item: in_order(item[0])):
        finite = not any(tensor.not_finite for tensor in held)
        rank = factors[name]["A"].shape[0] if "A" in factors.get(name, {}) else None
        parameters = sum(math.prod(tensor.shape) for tensor in held if tensor.dtype in NUMBERS)
        norm = math.hypot(*(tensor.norm or 0.0 for tensor in held)) if finite else None
        layers.append(LayerSummary(name, rank, parameters, norm, norms.get(name)))
    return layers


def _without_experts(factors: dict[str, Tensors], config: AdapterConfig) -> dict[str, Tensors]:
    """The factors of all layers except fused experts, where one tensor contains the factors of all experts."""
    ranks, r = Resolved(config, "rank_pattern"), config.low_rank.r
    return {name: pair for name, pair in factors.items() if "A" in pair and len(pair["A"]) == ranks.of(name, r)}


def in_order(name: str) -> list[tuple[int, str]]:
    """A key for sorting names, which puts layer 9 before layer 10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


def _update_norms(factors: Mapping[str, Mapping[str, Tensor]], config: AdapterConfig | None) -> dict[str, float]:
    """The norm |s B A| of each LoRA layer whose factors have matching shapes and finite values."""
    if config is None or config.method is not plain_lora_method():
        return {}
    scalings = Scalings(config)
    norms: dict[str, float] = {}
    for module, pair in factors.items():
        a, b = pair.get("A"), pair.get("B")
        if a is not None and b is not None and a.shape[0] == b.shape[1]:
            norm = LowRank(a, b, scalings.of(module)).norm()
            norms |= {module: norm} if math.isfinite(norm) else {}
    return norms


def _setting_ranks(tensors: list[TensorSummary], config: AdapterConfig | None) -> Counter[int]:
    """Rank -> number of layers with tensors of the method, by the settings `r` and rank_pattern."""
    rank = getattr(config.settings, "r", None) if config is not None else None
    if config is None or not isinstance(rank, int):
        return Counter()
    names = [split_name(tensor.name) for tensor in tensors]
    modules = {module for module, name in names if module and name.partition(".")[0] not in BASE_TENSORS}
    patterns = Resolved(config, "rank_pattern") if hasattr(config.settings, "rank_pattern") else None
    return Counter(rank if patterns is None else int(patterns.of(module, rank)) for module in modules)


def _text(value: object) -> str | None:
    return printable(value, 200) if isinstance(value, str) else None
