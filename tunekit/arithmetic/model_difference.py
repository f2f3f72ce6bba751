"""Compares two models A and B, tensor by tensor, and extracts B - A as a LoRA."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tunekit.adapters.folder.targets import concrete_targets
from tunekit.adapters.module_names import base_modules
from tunekit.arithmetic.difference import TensorDifference, compare, plain_lora
from tunekit.arithmetic.lora_folder import LoraFolder
from tunekit.arithmetic.low_rank import LowRank
from tunekit.arithmetic.nearest_lora import RankLoss, nearest_update
from tunekit.errors import AdapterError
from tunekit.model.quantized.weights import layer_kind
from tunekit.model.storage.mapped_files import MappedFiles
from tunekit.model.storage.quantized_layouts import open_weights
from tunekit.model.storage.rewrite import Rewriter


def compare_models(left: Path, right: Path) -> Iterator[TensorDifference]:
    """The difference of each tensor of the two folders, in the order of A's files. Integer tensors (packed weights)
    have no norm."""
    one, two = open_weights(left), open_weights(right)
    for name in [*one.headers, *(name for name in two.headers if name not in one.headers)]:
        yield _compare_tensors(name, _read(one, name), _read(two, name))


def _read(files: MappedFiles, name: str) -> Tensor | None:
    return files.read(name) if name in files.headers else None


def _compare_tensors(name: str, left: Tensor | None, right: Tensor | None) -> TensorDifference:
    kinds = [tensor.is_floating_point() for tensor in (left, right) if tensor is not None]
    if all(kinds):
        return compare(name, left, right)
    same = left is not None and right is not None and left.dtype == right.dtype and torch.equal(left, right)
    return TensorDifference(name, None, None, 0.0 if same else None, None)


def extract_models(left: Rewriter, right: Rewriter, rank: int) -> tuple[LoraFolder, dict[str, RankLoss], list[str]]:
    """Returns the LoRA of rank `rank` that is nearest to B - A, the error of each layer, and the names of differing
    tensors that a LoRA cannot change.

    All linear layers, embeddings and heads that differ get an update; other tensors that differ are left out. A tied
    head gets a separate update, because an adapter of the embedding does not change the head.
    Raises: AdapterError if the models have different modules, or if no matrix differs.
    """
    modules = base_modules(left.net)
    if modules.keys() != base_modules(right.net).keys():
        raise AdapterError(
            "the two models have different modules, so no LoRA can turn one into the other",
            "name a model and the base that it was tuned from",
        )
    kinds = {name: kind for name, module in modules.items() if (kind := layer_kind(module)) is not None}
    nearest: dict[str, tuple[LowRank, RankLoss]] = {}
    left_out: list[str] = []
    for name, kind in sorted(kinds.items()):
        try:
            one, two = left.base_weight(name).float(), right.base_weight(name).float()
        except KeyError:  # one of the models stores the layer in a different form
            left_out.append(f"{name}.weight")
            continue
        if one.shape != two.shape:
            left_out.append(f"{name}.weight")
        elif not torch.equal(one, two):
            embedding = kind == "embedding"
            nearest[name] = nearest_update(name, (two - one).t() if embedding else two - one, rank, embedding)
    for name in left.tensors.meta:
        if name.removesuffix(".weight") in kinds and name.endswith(".weight"):
            continue
        other = right.tensors.read(name) if name in right.names else None
        if not _compare_tensors(name, left.tensors.read(name), other).equal:
            left_out.append(name)
    if not nearest:
        raise AdapterError(
            "all matrices of the two models are equal, so there is nothing to extract", "name two different models"
        )
    conv1d, targets = any(kinds[name] == "conv1d" for name in nearest), concrete_targets(list(nearest), list(modules))
    return *plain_lora(nearest, conv1d=conv1d, target_modules=targets), left_out
