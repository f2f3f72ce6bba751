"""EVA initialisation of LoRA: computes A from a layer's inputs, batch by batch, and distributes the total rank over the
layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tunekit.adapters.blocks.plain_lora import alpha_for_rank
from tunekit.adapters.starts.start import LayerActivations, StartLayer
from tunekit.contracts import Tensors
from tunekit.errors import DataError
from tunekit.machine.devices import as_float64
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.recipe.starts.eva import EvaSettings
from tunekit.records import Target


class EvaStatistics:
    """The principal components of all inputs so far, by incremental decomposition; only the components are kept.

    Shapes: components (C, I), C = rho R; mean (I,). Source: Ross et al. 2008, as in PEFT's IncrementalPCA.
    """

    def __init__(self, settings: EvaSettings, target: Target) -> None:
        self.supervised_only = settings.supervised_only
        self.wanted = component_count(settings, target)
        self.count, self.squares = 0, 0.0  # number of rows, and the sum of their squared distances from the mean
        self.mean = torch.zeros(0)
        self.parts = torch.zeros(0, 0)  # (C, I): components times their singular values, float64

    def add(self, activations: LayerActivations) -> None:
        """Add one micro-batch."""
        rows = activations.inputs[activations.supervised] if self.supervised_only else activations.inputs
        rows = as_float64(rows)  # (N, I)
        if not len(rows):
            return
        mean, count = rows.mean(0), len(rows)
        centred = rows - mean
        stacked = [centred]
        self.squares += float(centred.square().sum())
        if self.count:
            shift = (self.mean - mean) * (self.count * count / (self.count + count)) ** 0.5
            stacked = [self.parts, centred, shift[None]]
            self.squares += float(shift.square().sum())
        else:
            self.mean = torch.zeros_like(mean)
        self.parts = _leading(torch.cat(stacked), self.wanted)
        self.mean = (self.mean * self.count + mean * count) / (self.count + count)
        self.count += count

    def finish(self) -> Tensors:
        """The components (C, I), their singular values (C,), and each component's share of the variance (C,)."""
        values = torch.linalg.vector_norm(self.parts, dim=1)
        tiny = torch.finfo(torch.float64).tiny
        shares = values.square() / max(self.squares, tiny)
        return {"components": self.parts / values.clamp(min=tiny)[:, None], "values": values, "shares": shares}


def component_count(settings: EvaSettings, target: Target) -> int:
    """The number of components C, which is the maximum rank of a layer."""
    assert target.r is not None
    return min(round(target.r * settings.rho), target.in_features, target.out_features)


def statistics_bytes(settings: EvaSettings, target: Target) -> int:
    """Bytes of EvaStatistics for one layer."""
    return torch.float64.itemsize * target.in_features * (component_count(settings, target) + 1)


def _leading(matrix: Tensor, count: int) -> Tensor:
    """S V^T (C, I) for the `count` largest singular values of a matrix (N, I). Computed in float64 from the smaller
    of its two Gram matrices."""
    if matrix.shape[0] <= matrix.shape[1]:
        _, u = torch.linalg.eigh(matrix @ matrix.t())  # ascending
        return u[:, -count:].flip(1).t() @ matrix
    values, v = torch.linalg.eigh(matrix.t() @ matrix)
    roots = values[-count:].flip(0).clamp(min=0).sqrt()  # (C,)
    return torch.mul(v[:, -count:].flip(1).t(), roots[:, None])


def share_ranks(
    settings: EvaSettings, targets: Sequence[Target], evidence: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, int]:
    """Distributes the total rank over the layers; returns layer -> rank. The components that explain the largest shares
    of their layer's variance are chosen.

    Source: Paischer et al. 2024, section 3.3.
    """
    linear = [target for target in targets if target.name in evidence]
    if settings.rho == 1:
        return {target.name: target.r or 0 for target in linear}
    budget = sum(target.r or 0 for target in linear)
    ranked = sorted(
        (-share, place, target.name)
        for target in linear
        for place, share in enumerate(evidence[target.name]["shares"].tolist())
    )
    ranks = {target.name: 0 for target in linear}
    for _, _, name in ranked[:budget]:
        ranks[name] += 1
    return ranks


def alpha_of(settings: LowRankSettings, target: Target, rank: int) -> float | None:
    """A layer's alpha after its rank has changed. Alpha changes with the rank, so that the scaling stays the same,
    unless the recipe disables this."""
    assert isinstance(settings.start, EvaSettings)
    if not settings.start.adjust_alpha or target.alpha is None or not target.r:
        return target.alpha
    return alpha_for_rank(settings, target.alpha, target.r, rank)


def make_start(settings: EvaSettings, layer: StartLayer[Tensors]) -> tuple[Tensor, Tensor]:
    """A (R, I) = the R first principal components of the inputs, B (O, R) = 0.

    Raises: DataError if the batches had fewer tokens than the rank. Source: Paischer et al. 2024, algorithm 1.
    """
    components, values = layer.evidence["components"], layer.evidence["values"]
    if len(components) < layer.rank:
        raise DataError(
            f"the first batches contain {len(components)} usable tokens, fewer than the rank {layer.rank}",
            "raise adapter.start.batches, or lower adapter.r",
            key="adapter.start",
        )
    a = components[: layer.rank]
    if settings.whiten:
        a = a / values[: layer.rank, None].sqrt()
    return a, torch.zeros(layer.outputs, layer.rank)


STATISTICS = EvaStatistics
