"""FourierFT, for linear layers and Conv1D, quantized or not."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn

from tunekit.adapters.base import Slot, Slots
from tunekit.adapters.blocks.delta_product import DeltaLayer
from tunekit.adapters.folder.fields import ANY, LAYER_FIXED, Fixed, PeftSide, same_names
from tunekit.adapters.method import Conflict, Method, always_linear
from tunekit.machine.placing import to_device
from tunekit.recipe.adapters.fourierft import FourierftSettings
from tunekit.records import Target


class Fourierft(DeltaLayer[FourierftSettings]):
    """Sparse spectrum of the update: y = W x + s Re(IFFT2(F)) x, with F zero except at N random indices.

    Shapes: x (..., I) -> y (..., O); F (O, I); coefficients (N,). Starts as the identity: F = 0. Source: Gao et al.
    2024, eq. 2 to 4.
    """

    spectrum: nn.Parameter

    @classmethod
    def slots(cls, settings: FourierftSettings, target: Target) -> Slots:
        return {"spectrum": Slot("fourierft_spectrum", (settings.n_frequency,))}

    def make(self, spectrum: Tensor) -> Tensor:
        """The update (O, I), float32."""
        outputs, inputs = self.target.out_features, self.target.in_features
        indices = _indices(outputs * inputs, self.settings.n_frequency, self.settings.random_loc_seed)
        flat = torch.zeros(outputs * inputs, dtype=spectrum.dtype, device=spectrum.device)
        dense = flat.index_put((to_device(indices, spectrum.device),), spectrum).reshape(outputs, inputs)
        return torch.fft.ifft2(dense).real * self.settings.scaling


@lru_cache(maxsize=64)
def _indices(elements: int, count: int, seed: int) -> Tensor:
    """Flat indices (N,) of the coefficients; PEFT does not save them, so they are drawn as PEFT draws them."""
    return torch.randperm(elements, generator=Generator("cpu").manual_seed(seed), device="cpu")[:count].clone()


def _conflicts(settings: FourierftSettings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    smallest = min(target.in_features * target.out_features for target in targets)
    if settings.n_frequency <= smallest:
        return []
    what = f"{settings.n_frequency} frequencies are too many for the smallest layer"
    return [Conflict("n_frequency", what, f"use at most {smallest}")]


FIELDS = same_names(n_frequency=1000, scaling=150.0, random_loc_seed=777)
FIXED: Fixed = {**LAYER_FIXED, "init_weights": (True, ANY), "n_frequency_pattern": ({}, None)}
METHOD = Method(
    peft=PeftSide("FOURIERFT", FourierftSettings, FIELDS, FIXED),
    layer=Fourierft,
    tensors=("fourierft_spectrum",),
    is_linear=always_linear,
    conflicts=_conflicts,
)
