"""How far two models are from each other, tensor by tensor, and the LoRA of one that is nearest to the other."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tunekit.adapters.folder.targets import concrete_targets
from tunekit.adapters.module_names import base_modules
from tunekit.arithmetic.difference import TensorDifference, compare
from tunekit.arithmetic.low_rank import LowRank, decompose
from tunekit.arithmetic.nearest_lora import RankLoss, loss_of
from tunekit.errors import AdapterError
from tunekit.model.quantized.weights import layer_kind
from tunekit.model.storage.rewrite import Rewriter
from tunekit.model.storage.shards import ShardReader


def compare_models(left: Path, right: Path) -> Iterator[TensorDifference]:
    """Every tensor of either folder, in the order of A's files. Whole numbers (packed weights) have no norm."""
    one, two = ShardReader(left), ShardReader(right)
    for name in [*one, *(name for name in two if name not in one.headers)]:
        yield _compare_tensors(name, _read(one, name), _read(two, name))


def _read(reader: ShardReader, name: str) -> Tensor | None:
    return reader.read(name) if name in reader.headers else None


def _compare_tensors(name: str, left: Tensor | None, right: Tensor | None) -> TensorDifference:
    kinds = [tensor.is_floating_point() for tensor in (left, right) if tensor is not None]
    if all(kinds):
        return compare(name, left, right)
    same = left is not None and right is not None and left.dtype == right.dtype and torch.equal(left, right)
    return TensorDifference(name, None, None, 0.0 if same else None, None)


@dataclass
class ModelDifference:
    """B - A as a LoRA of A. `left_out`: tensors that differ and are no matrices of layers, |B - A| (None: shapes)."""

    updates: dict[str, LowRank] = field(default_factory=dict)
    losses: dict[str, RankLoss] = field(default_factory=dict)
    left_out: dict[str, float | None] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    conv1d: bool = False


def extract_models(left: Rewriter, right: Rewriter, rank: int) -> ModelDifference:
    """The LoRA of that rank nearest to B - A, for every linear layer, embedding and head that differs.

    A tied head that changes with its embedding gets an update of its own, as an adapter of an embedding leaves the
    head alone.
    Raises: AdapterError where the two have other modules, or no matrix differs.
    """
    found = ModelDifference()
    modules = base_modules(left.net)
    layers = {name: layer_kind(module) for name, module in modules.items() if layer_kind(module) is not None}
    if modules.keys() != base_modules(right.net).keys():
        raise AdapterError("the two models have other modules, and no LoRA of one is the other")
    for name, kind in sorted(layers.items()):
        _extract_module(found, name, str(kind), left, right, rank)
    for name in left.tensors.meta:
        if name.removesuffix(".weight") in layers and name.endswith(".weight"):
            continue
        other = right.tensors.read(name) if name in right.names else None
        difference = _compare_tensors(name, left.tensors.read(name), other)
        if not difference.equal:
            found.left_out[name] = difference.distance
    if not found.updates:
        raise AdapterError("no matrix of the two models differs: there is nothing to extract")
    found.target_modules = concrete_targets(list(found.updates), list(modules))
    return found


def _extract_module(found: ModelDifference, name: str, kind: str, left: Rewriter, right: Rewriter, rank: int) -> None:
    """One layer's update, if it differs."""
    try:
        one, two = left.base_weight(name).float(), right.base_weight(name).float()
    except KeyError:  # one of them stores the layer in another form
        found.left_out[f"{name}.weight"] = None
        return
    if one.shape != two.shape:
        found.left_out[f"{name}.weight"] = None
        return
    if torch.equal(one, two):
        return
    embedding = kind == "embedding"
    delta = (two - one).t() if embedding else two - one
    found.updates[name] = decompose(delta, rank, embedding=embedding)
    found.losses[name] = loss_of(name, delta, found.updates[name])
    found.conv1d = found.conv1d or kind == "conv1d"
