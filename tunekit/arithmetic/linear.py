"""Methods other than LoRA whose update is linear in their tensors: there a weighted sum of adapters is an adapter.

Comes in: folders of one such method with the same settings, weights.  Goes out: its tensors.  Next: loose_writing.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.folder.config import CONFIG_NAME, TENSORS_NAME, AdapterConfig, read_adapter_config
from tunekit.arithmetic.loose_lora import check_files, refuse_not_finite
from tunekit.errors import AdapterError
from tunekit.files.tensors import iterate_tensors, read_tensor_header
from tunekit.files.untrusted import parse_json, read_small, same, shown

SUFFIXES = {  # method -> how its tensors' names end
    "bitfit": (".bias",),
    "c3a": (".c3a_kernel",),
    "fourierft": (".fourierft_spectrum",),
    "ia3": (".ia3_l",),
    "ln_tuning": (".ln_tuning_layers.weight", ".ln_tuning_layers.bias"),
    "miss": (".miss_block",),
    "shira": (".shira_weight", ".shira_indices"),
}
COPIES = ("bitfit", "ln_tuning")  # the tensors are the base's with their changes
NOT_COMPARED = {"init_from", "dropout"}  # settings that change nothing in what a finished adapter computes


@dataclass(frozen=True)
class LooseTensors:
    """An adapter of such a method by itself."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    fields: dict[str, Any]


def read_linear(folder: Path) -> LooseTensors:
    """Read a folder whole.

    Raises: AdapterError where the method is not one of these, or a tensor is none of its.
    """
    config = read_adapter_config(folder)
    method = config.settings.method
    if method not in SUFFIXES or getattr(config.settings, "variant", "") == "bat":
        what = f"{method} adapters cannot be added: their update is not linear in their tensors"
        raise AdapterError(what, "make a LoRA of each first: tunekit adapter convert --rank R", file=config.file)
    path = folder / TENSORS_NAME
    header = read_tensor_header(path)
    foreign = [key for key in header if not key.startswith("base_model.model.") or not key.endswith(SUFFIXES[method])]
    if foreign or not header:
        what = f"'{shown(foreign[0], 200)}' is no tensor of this adapter" if foreign else "holds no tensors"
        raise AdapterError(what, file=str(path))
    check_files(config)
    tensors = dict(iterate_tensors(path, header))
    refuse_not_finite(tensors, str(path))
    return LooseTensors(config, tensors, parse_json(read_small(folder / CONFIG_NAME), config.file))


def combine_linear(adapters: Sequence[LooseTensors], weights: Sequence[float]) -> dict[str, Tensor]:
    """Tensors whose update is the sum of w D: the sum of w t; of IA3, whose scales start at 1, 1 + sum of w (t - 1).

    Raises: AdapterError where settings or tensors differ in anything but the trained numbers.
    """
    first = adapters[0]
    for other in adapters[1:]:
        _refuse_difference(first, other)
    method = first.config.settings.method
    if method in COPIES and not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        what = f"{method} trains whole tensors, and the weights sum to {sum(weights):g} and not to 1"
        raise AdapterError(what, "give weights that sum to 1", key="--weights")
    start = 1.0 if method == "ia3" else 0.0

    def add(tensors: list[Tensor]) -> Tensor:
        changes = [weight * (tensor.float() - start) for weight, tensor in zip(weights, tensors, strict=True)]
        return torch.stack(changes).sum(0) + start

    return {
        key: add([adapter.tensors[key] for adapter in adapters]) if tensor.is_floating_point() else tensor
        for key, tensor in first.tensors.items()
    }


def _refuse_difference(first: LooseTensors, other: LooseTensors) -> None:
    file, name = other.config.file, first.config.folder
    here, there = (loose.config.settings.model_dump(exclude=NOT_COMPARED) for loose in (first, other))
    for key, value in here.items():
        if not same(_plain(value), _plain(there.get(key))):
            what = f"{key} is {shown(there.get(key))}, and {shown(value)} in {name}"
            raise AdapterError(what, "only adapters of the same settings can be added", file=file)
    for key in sorted(first.tensors.keys() | other.tensors.keys()):
        left, right = first.tensors.get(key), other.tensors.get(key)
        if left is None or right is None or left.shape != right.shape:
            raise AdapterError(f"'{key}' is missing, or of another shape, in one of it and {name}", file=file)
        if not left.is_floating_point() and not torch.equal(left, right):
            what = f"'{key}' names other places than in {name}"
            raise AdapterError(what, "make a LoRA of each first: tunekit adapter convert --rank R", file=file)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple) else value
