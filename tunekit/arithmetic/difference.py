"""Compares two adapters A and B, layer by layer, and extracts B - A as a LoRA.

The base is read only if an adapter's method needs it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunekit.adapters.folder.config import AdapterConfig, read_adapter_config
from tunekit.arithmetic.lora_folder import LoraFolder, plain_lora_method, read_lora_folder
from tunekit.arithmetic.low_rank import LowRank, reduce_rank, weighted_sum
from tunekit.arithmetic.nearest_lora import RankLoss, layer_change, loss_between, nearest_update, trained_beside
from tunekit.arithmetic.on_base import attach_to_base
from tunekit.errors import AdapterError
from tunekit.records import with_article
from tunekit.targets.target import trained_base

PIECE = 2**22  # elements that are summed at a time
Update = LowRank | Tensor  # the update of one layer, as factors or as a matrix (O, I)


@dataclass(frozen=True)
class TensorDifference:
    """The difference of two tensors or updates A and B: |A|, |B|, |B - A|, and the cosine of the angle between A and B.

    `left`, `right`: the norms |A| and |B|; None if the tensor is missing. `distance`: |B - A|; None if A and B cannot
    be compared, because one is missing or their shapes differ. `cosine`: None if they cannot be compared, or if one of
    them is 0. JSON does not contain values that are None.
    """

    name: str
    left: float | None
    right: float | None
    distance: float | None
    cosine: float | None

    @property
    def equal(self) -> bool:
        """Whether A and B are equal."""
        return self.distance == 0.0


@dataclass(frozen=True)
class AdapterChanges:
    """All changes that an adapter makes: its updates of layers, and its other trained tensors (`rest`).

    `of`: a function that returns the update of the layer with this name, or None if the adapter does not change it.
    """

    config: AdapterConfig
    names: frozenset[str]
    of: Callable[[str], Update | None]
    rest: Mapping[str, Tensor]
    embeddings: frozenset[str]
    conv1d: bool


def read_changes(folder: Path, base: str | None) -> AdapterChanges:
    """Reads all changes of an adapter folder. A LoRA's changes are read from its file; other methods also need the
    matrices of the base.

    Raises: AdapterError or ModelError if the adapter or the base cannot be read.
    """
    config = read_adapter_config(folder)
    if config.method is plain_lora_method():
        lora = read_lora_folder(folder)
        embeddings = frozenset(name for name, update in lora.updates.items() if update.embedding)
        names, conv1d = frozenset(lora.updates), lora.fan_in_fan_out
        return AdapterChanges(config, names, lora.updates.get, lora.rest, embeddings, conv1d)
    attached, rewriter = attach_to_base(folder, trained_base(config, base))
    if attached.model_adapter is not None or attached.parameters:
        named = with_article(config.settings.method)
        what = f"{named} adapter does not change weights of layers, so it cannot be compared"
        raise AdapterError(what, "summarise each adapter with: tunekit adapter show", file=config.file)
    kinds = {target.name: target.kind for target in attached.targets}
    embeddings = frozenset(name for name, kind in kinds.items() if kind == "embedding")
    names, conv1d = frozenset(attached.layers), "conv1d" in kinds.values()

    def change_of(name: str) -> Tensor | None:
        return layer_change(attached, name, *rewriter.trained_on(name))[0] if name in names else None

    return AdapterChanges(config, names, change_of, trained_beside(attached), embeddings, conv1d)


def compare(name: str, left: Update | None, right: Update | None) -> TensorDifference:
    """Compares two updates of one layer, or two tensors. Low-rank updates are compared without computing their full
    matrices."""
    if left is None or right is None or left.shape != right.shape:
        return TensorDifference(name, _norm(left), _norm(right), None, None)
    if isinstance(left, LowRank) and isinstance(right, LowRank):
        if torch.equal(left.a, right.a) and torch.equal(left.b, right.b) and left.scaling == right.scaling:
            norm = left.norm()  # equal factors have distance 0; computing it would leave a rounding error
            return TensorDifference(name, norm, norm, 0.0, 1.0 if norm else None)
        inner, distance = left.inner(right), weighted_sum([right, left], [1.0, -1.0]).norm()
    else:
        one, two = (change.dense() if isinstance(change, LowRank) else change for change in (left, right))
        inner, distance = _sum(one, two, torch.mul), math.sqrt(_sum(one, two, lambda a, b: (b - a).square()))
    sizes = (_norm(left) or 0.0) * (_norm(right) or 0.0)
    cosine = max(-1.0, min(1.0, inner / sizes)) if sizes else None
    return TensorDifference(name, _norm(left), _norm(right), distance, cosine)


def _norm(change: Update | None) -> float | None:
    if change is None:
        return None
    return change.norm() if isinstance(change, LowRank) else math.sqrt(_sum(change, change, torch.mul))


def _sum(left: Tensor, right: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The sum of `of(left, right)` over all elements. It is computed in float64 and in slices, so that no whole tensor
    is copied."""
    pieces = zip(torch.split(left.reshape(-1), PIECE), torch.split(right.reshape(-1), PIECE), strict=True)
    return sum(float(of(one.double(), two.double()).sum()) for one, two in pieces)


def together(differences: list[TensorDifference]) -> TensorDifference:
    """The difference over all layers, as if all of their elements were one vector. A missing update counts as 0."""
    left = math.hypot(*(d.left or 0.0 for d in differences))
    right = math.hypot(*(d.right or 0.0 for d in differences))
    distance = math.hypot(*(d.distance if d.distance is not None else (d.left or d.right or 0.0) for d in differences))
    inner = sum((d.cosine or 0.0) * (d.left or 0.0) * (d.right or 0.0) for d in differences)
    return TensorDifference("all layers", left, right, distance, inner / (left * right) if left and right else None)


def extract(left: AdapterChanges, right: AdapterChanges, rank: int) -> tuple[LoraFolder, dict[str, RankLoss]]:
    """The LoRA of a given rank that is nearest to B - A, and the error of each layer. Layers that are equal in A and B
    get no update.

    Raises: AdapterError if the shapes of a layer differ, or if nothing differs.
    """
    nearest: dict[str, tuple[LowRank, RankLoss]] = {}
    for name in sorted(left.names | right.names):
        one, two = left.of(name), right.of(name)
        if one is not None and two is not None and one.shape != two.shape:
            what = f"'{name}' has the shape {list(two.shape)}, but {list(one.shape)} in {left.config.folder}"
            raise AdapterError(what, "compare only adapters of the same base", file=str(right.config.folder))
        if not compare(name, one, two).equal:
            embedding = name in left.embeddings | right.embeddings
            nearest[name] = _extract_layer(name, one, two, rank, embedding)
    if not nearest:
        raise AdapterError(
            f"{left.config.folder} and {right.config.folder} are equal, so there is nothing to extract",
            "name two different adapters",
        )
    return plain_lora(nearest, conv1d=left.conv1d or right.conv1d)


def plain_lora(
    nearest: Mapping[str, tuple[LowRank, RankLoss]], *, conv1d: bool, target_modules: Sequence[str] | str | None = None
) -> tuple[LoraFolder, dict[str, RankLoss]]:
    """A LoRA with only these updates, and the error of each layer.

    `target_modules`: the value in the configuration; None: the full names of the layers.
    """
    method = plain_lora_method()
    config = AdapterConfig(Path(), method, method.peft.settings(), None, None, None)
    updates = {name: update for name, (update, _) in nearest.items()}
    return LoraFolder(config, updates, {}, target_modules, conv1d), {name: loss for name, (_, loss) in nearest.items()}


def _extract_layer(
    name: str, one: Update | None, two: Update | None, rank: int, embedding: bool
) -> tuple[LowRank, RankLoss]:
    pairs = [(change, weight) for change, weight in ((two, 1.0), (one, -1.0)) if change is not None]
    low = [(change, weight) for change, weight in pairs if isinstance(change, LowRank)]
    if len(low) == len(pairs):
        exact = weighted_sum([change for change, _ in low], [weight for _, weight in low])
        update = reduce_rank(exact, min(rank, exact.rank, *exact.shape))
        return update, loss_between(name, exact, update)
    matrices = [(c.dense() if isinstance(c, LowRank) else c) * weight for c, weight in pairs]
    return nearest_update(name, torch.stack(matrices).sum(0), rank, embedding)
