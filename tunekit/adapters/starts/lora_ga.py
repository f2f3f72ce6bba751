"""LoRA-GA initialisation of LoRA: A and B from the gradient of W."""

import torch
from torch import Tensor

from tunekit.adapters.starts.decompose import largest_parts
from tunekit.adapters.starts.start import LayerActivations, StartLayer
from tunekit.errors import NumericsError
from tunekit.recipe.starts.lora_ga import LoraGaSettings
from tunekit.records import Target


class LoraGaStatistics:
    """G (O, I) float32: the gradient of the mean loss over all batches."""

    def __init__(self, settings: LoraGaSettings, target: Target) -> None:
        self.gradient = torch.zeros(0)

    def add(self, activations: LayerActivations) -> None:
        """Add the gradient of one micro-batch, whose loss is divided by the number of units in all micro-batches."""
        assert activations.gradients is not None
        product = activations.gradients.t() @ activations.inputs
        self.gradient = product if not self.gradient.numel() else self.gradient.add_(product)

    def finish(self) -> Tensor:
        """The gradient G (O, I)."""
        return self.gradient


def statistics_bytes(settings: LoraGaSettings, target: Target) -> int:
    """Bytes of LoraGaStatistics for one layer."""
    return torch.float32.itemsize * target.in_features * target.out_features


def make_start(settings: LoraGaSettings, layer: StartLayer[Tensor]) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) from different vectors among the first 2 R singular vectors of G = U S V^T.

    `stable`: A = f V^T, B = f U, f = O^(1/4) / sqrt(gamma). `unit`: f = 1. `peft`: A = V^T, B = f U S, as in PEFT 0.21
    (except for Conv1D, where PEFT's f confuses inputs with outputs).
    Raises: NumericsError for a layer without a gradient. Source: Wang et al. 2024, algorithm 1, theorem 3.2.
    """
    gradient = layer.evidence
    if not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
        raise NumericsError(f"the gradient of {layer.name} is 0 or not finite", "choose another adapter.start")
    u, s, vh = largest_parts(gradient, 2 * layer.rank, settings.iterations, layer.generator)
    of_a, of_b = _places(settings.direction, layer.rank)
    a, b = vh[of_a], u[:, of_b]
    factor = 1.0 if settings.scale == "unit" else layer.outputs**0.25 / settings.gamma**0.5
    return (a, b * s[of_b] * factor) if settings.scale == "peft" else (a * factor, b * factor)


def _places(direction: str, rank: int) -> tuple[slice, slice]:
    """The slice of singular vectors that initialise A, and the slice of singular vectors that initialise B."""
    first, second = slice(0, rank), slice(rank, 2 * rank)
    if direction == "ArBr":
        return slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)
    return (first, second) if direction == "ArB2r" else (second, first)


STATISTICS = LoraGaStatistics
