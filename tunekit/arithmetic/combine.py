"""Combines several adapters of one base into one adapter, with the methods of PEFT's add_weighted_adapter.

The results are the same as PEFT's, digit for digit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from tunekit.adapters.folder.expected import BASE_COPY
from tunekit.arithmetic.lora_folder import TOKEN_ROWS, LoraFolder
from tunekit.arithmetic.low_rank import LowRank, decompose, reduce_rank, weighted_sum
from tunekit.arithmetic.pruning import PRUNING, SIGNS, weighted
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError, InputError
from tunekit.model.call import seed_for

OF_MATRICES = tuple(f"{kind}_svd" for kind in PRUNING)  # sum the matrices s B A, and reduce the sum to a rank
KINDS = ("linear", "cat", "svd", *PRUNING, *OF_MATRICES)  # linear and PRUNING sum the factors A and B separately
MAY_ADD_COPIES = ("linear", "cat", "svd")  # methods that can combine trained copies without the base


@dataclass(frozen=True)
class Mixture:
    """The settings of a combination.

    `rank`: the rank of the svd methods; by default the largest rank of the adapters.
    `majority_sign`: how the ties methods determine the majority's sign; by default `total`.
    `seed`: the seed of random pruning; by default 0.
    """

    kind: str
    weights: tuple[float, ...]
    density: float | None = None
    rank: int | None = None
    majority_sign: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Combined:
    """The result of a combination: the new updates, and the other new tensors (`rest`).

    `distance`: the relative error of the new update over all layers, |new - sum of w D| / |sum of w D|, with the
    weights w and updates D of the adapters.
    `worst`: the layer with the largest relative error, and this error.
    """

    updates: dict[str, LowRank]
    rest: Tensors
    distance: float
    worst: tuple[str, float]

    def like(self, adapters: Sequence[LoraFolder]) -> LoraFolder:
        """The adapter whose settings the combined adapter gets: the first adapter with the same layers, or else the
        first adapter. `rest` is replaced by the combined tensors."""
        same = (adapter for adapter in adapters if adapter.updates.keys() == self.updates.keys())
        conv1d = any(adapter.fan_in_fan_out for adapter in adapters)
        parameters = frozenset[str]().union(*(adapter.parameters for adapter in adapters))
        return replace(next(same, adapters[0]), rest=self.rest, fan_in_fan_out=conv1d, parameters=parameters)


def check_mixture(mixture: Mixture, count: int) -> None:
    """Raises: InputError that names the option, if the settings of a combination are invalid."""
    if mixture.kind not in KINDS:
        raise InputError(
            f"there is no combination method '{mixture.kind}'", f"choose {', '.join(KINDS)}", key="--method"
        )
    if count < 2:
        raise InputError("there is only one adapter, so there is nothing to combine", "name two or more")
    if len(mixture.weights) != count:
        what = f"{len(mixture.weights)} weights for {count} adapters"
        raise InputError(what, "give one weight for each adapter, such as 0.7,0.3", key="--weights")
    if not all(math.isfinite(weight) and weight != 0 for weight in mixture.weights):
        raise InputError("a weight must be a number other than 0", "remove the adapter instead", key="--weights")
    if mixture.majority_sign not in (None, *SIGNS):
        what = f"'{mixture.majority_sign}' is not a majority sign"
        raise InputError(what, "choose total or frequency", key="--majority-sign")
    if mixture.majority_sign is not None and "ties" not in mixture.kind:
        raise InputError(
            f"a majority sign has no effect with the method {mixture.kind}", "leave it out", key="--majority-sign"
        )
    if mixture.seed is not None and not mixture.kind.startswith("dare"):
        raise InputError(f"a seed has no effect with the method {mixture.kind}", "leave it out", key="--seed")
    prunes = mixture.kind.removesuffix("_svd") in PRUNING
    if prunes and (mixture.density is None or not 0 < mixture.density <= 1):
        raise InputError(f"{mixture.kind} needs a density above 0 and up to 1", "such as 0.5", key="--density")
    if not prunes and mixture.density is not None:
        raise InputError(f"a density has no effect with the method {mixture.kind}", "leave it out", key="--density")
    if mixture.rank is not None and not mixture.kind.endswith("svd"):
        raise InputError(f"the rank of {mixture.kind} follows from the adapters' ranks", "leave it out", key="--rank")
    if mixture.rank is not None and mixture.rank < 1:
        raise InputError("the rank must be at least 1", "write --rank 8, for example", key="--rank")


def combine(adapters: Sequence[LoraFolder], mixture: Mixture) -> Combined:
    """Combine several adapters into one.

    If only some adapters change a layer, only their updates are combined.
    Raises: AdapterError if ranks, shapes or other tensors do not fit together.
    """
    check_mixture(mixture, len(adapters))
    mixture = replace(mixture, rank=mixture.rank or max(update.rank for a in adapters for update in a.updates.values()))
    names = sorted({name for adapter in adapters for name in adapter.updates})
    updates: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name in names:
        members = [index for index, adapter in enumerate(adapters) if name in adapter.updates]
        layer_updates = [adapters[index].updates[name] for index in members]
        for update, index in zip(layer_updates, members, strict=True):
            if (update.shape, update.embedding) != (layer_updates[0].shape, layer_updates[0].embedding):
                first = adapters[members[0]].name
                what = f"'{name}' has the shape {list(update.shape)}, but {list(layer_updates[0].shape)} in {first}"
                raise AdapterError(what, "combine only adapters of the same base", file=adapters[index].name)
        exact = weighted_sum(layer_updates, [mixture.weights[index] for index in members])
        updates[name] = _combine_layer(name, layer_updates, members, exact, mixture)
        errors[name] = weighted_sum([updates[name], exact], [1.0, -1.0]).norm()
        norms[name] = exact.norm()
    if mixture.kind == "cat" and not any(adapter.config.low_rank.rank_pattern for adapter in adapters):
        most = max(update.rank for update in updates.values())
        updates = {name: update.padded(min(most, *update.shape)) for name, update in updates.items()}
    relative = {name: errors[name] / norms[name] if norms[name] else 0.0 for name in names}
    worst = max(names, key=lambda name: relative[name])
    distance = math.hypot(*errors.values()) / (math.hypot(*norms.values()) or 1.0)
    rest = {key: _combine_copies(key, adapters, mixture) for key in sorted({key for a in adapters for key in a.rest})}
    return Combined(updates, rest, distance, (worst, relative[worst]))


def _combine_layer(
    name: str, updates: Sequence[LowRank], members: Sequence[int], exact: LowRank, mixture: Mixture
) -> LowRank:
    """The combined update of one layer. `exact`: the weighted sum of the layer's updates, without approximation."""
    if mixture.kind == "cat":  # a rank above the layer's size is not needed, and cannot be trained
        return reduce_rank(exact, min(exact.shape)) if exact.rank > min(exact.shape) else exact
    rank = mixture.rank or 1
    if mixture.kind == "svd":
        return reduce_rank(exact, min(rank, exact.rank))
    weights = [mixture.weights[index] for index in members]
    if mixture.kind in OF_MATRICES:
        matrices = [update.dense() for update in updates]
        generators = [_generator(mixture, name, "", index) for index in members]
        matrix = _weighted(mixture, matrices, weights, generators)
        return decompose(matrix, rank, embedding=updates[0].embedding)
    ranks = sorted({update.rank for update in updates})
    if len(ranks) > 1:
        how = "use cat or svd; for pruning, use a method that ends in _svd"
        what = f"{mixture.kind} needs adapters of equal rank, but '{name}' has the ranks {', '.join(map(str, ranks))}"
        raise AdapterError(what, how, key="--method")
    return _factor_wise(name, updates, weights, members, mixture)


def _factor_wise(
    name: str, updates: Sequence[LowRank], weights: Sequence[float], members: Sequence[int], mixture: Mixture
) -> LowRank:
    """Combines factors separately: the new A is the sum of all A, and the new B is the sum of all B.

    Each A and each B is first multiplied by the square root of |w s| (weight w, scaling s). A also takes the sign of w
    s.
    """
    scales = [weight * update.scaling for weight, update in zip(weights, updates, strict=True)]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    generators = {factor: [_generator(mixture, name, factor, index) for index in members] for factor in "AB"}
    a = _weighted(mixture, [update.a for update in updates], signed, generators["A"])
    b = _weighted(mixture, [update.b for update in updates], roots, generators["B"])
    return LowRank(a, b, 1.0, updates[0].embedding)


def _weighted(
    mixture: Mixture, tensors: Sequence[Tensor], weights: Sequence[float], generators: Sequence[Generator]
) -> Tensor:
    kind, density = mixture.kind.removesuffix("_svd"), 1.0 if mixture.density is None else mixture.density
    sign = mixture.majority_sign or SIGNS[0]
    return weighted(kind, tensors, weights, density=density, majority_sign=sign, generators=generators)


def _generator(mixture: Mixture, name: str, factor: str, index: int) -> Generator:
    """The random generator of one tensor. It depends only on the seed, the tensor's name and the adapter's index."""
    return torch.Generator().manual_seed(seed_for("combine", mixture.seed or 0, name, factor, index))


def _combine_copies(key: str, adapters: Sequence[LoraFolder], mixture: Mixture) -> Tensor:
    """Combines a fully trained tensor, such as a module's copy or a bias. If it differs between adapters, the weights
    must sum to 1.

    A copy is the base's tensor plus a change. If the weights sum to 1, the weighted copies sum to the base's tensor
    plus the weighted changes. A copy of the base's embedding that was not trained must be equal in all adapters that
    contain it.
    """
    members = [adapter for adapter in adapters if key in adapter.rest]
    tensors = [adapter.rest[key] for adapter in members]
    rows = not key.endswith(TOKEN_ROWS) or all(_tokens(adapter) == _tokens(adapters[0]) for adapter in adapters)
    same = rows and all(tensor.shape == tensors[0].shape and torch.equal(tensor, tensors[0]) for tensor in tensors)
    if same and (len(tensors) == len(adapters) or key.endswith(BASE_COPY)):
        return tensors[0]
    problem = None
    if key.endswith(BASE_COPY):
        problem = "is a copy of the base's weight, but differs between the adapters"
    elif len(tensors) != len(adapters):
        problem = f"is fully trained by only {len(tensors)} of the {len(adapters)} adapters"
    elif any(tensor.shape != tensors[0].shape for tensor in tensors):
        problem = "has different shapes in the adapters"
    elif not rows:
        problem = "contains rows of different tokens in the adapters"
    elif mixture.kind not in MAY_ADD_COPIES:
        problem = f"is fully trained, and {mixture.kind} cannot combine it without the base"
    elif not math.isclose(sum(mixture.weights), 1.0, abs_tol=1e-6):
        problem = f"is fully trained, so the weights must sum to 1, but they sum to {sum(mixture.weights):g}"
    if problem:
        how = (
            "the methods linear, cat and svd average such tensors if all adapters contain them and the weights sum to 1"
        )
        raise AdapterError(f"'{key}' {problem}", how, file=members[0].name)
    return weighted("linear", [tensor.float() for tensor in tensors], mixture.weights)


def _tokens(adapter: LoraFolder) -> object:
    return adapter.config.low_rank.trainable_token_indices
