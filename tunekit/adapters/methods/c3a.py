"""C3A, for linear layers and Conv1D, quantized or not."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

from tunekit.adapters.base import LayerAdapter, Slot, Slots
from tunekit.adapters.blocks.divisors import divisor_conflicts
from tunekit.adapters.folder.fields import ANY, Fixed, PeftSide, same_names
from tunekit.adapters.method import Conflict, Method, always_linear
from tunekit.recipe.adapters.c3a import C3aSettings
from tunekit.records import Target


class C3a(LayerAdapter[C3aSettings]):
    """Circulant blocks: y = W x + D x, where D consists of blocks of side S, block[i, j] = k[(j - i) mod S] / I.

    Shapes: x (..., I) -> y (..., O); kernels k (O / S, I / S, S). Starts as the identity: k = 0. The product is
    computed with float32 Fourier transforms along S. Source: Chen et al. 2025, eq. 5.
    """

    kernels: nn.Parameter

    @classmethod
    def slots(cls, settings: C3aSettings, target: Target) -> Slots:
        side = settings.block_size
        return {"kernels": Slot("c3a_kernel", (target.out_features // side, target.in_features // side, side))}

    def update(self, x: Tensor) -> Tensor:
        side = self.settings.block_size
        pieces = rfft(x.float().reshape(*x.shape[:-1], -1, side))  # (..., I / S, S / 2 + 1)
        kernels = rfft(self.kernels).conj()  # (O / S, I / S, S / 2 + 1)
        products = torch.einsum("...nf,mnf->...mf", pieces, kernels)
        return irfft(products, n=side).flatten(start_dim=-2) / self.target.in_features  # (..., O)

    def delta(self) -> Tensor:
        side, inputs = self.settings.block_size, self.target.in_features
        steps = torch.arange(side, device=self.kernels.device)
        blocks = self.kernels[:, :, (steps[None] - steps[:, None]) % side]  # (O / S, I / S, S, S)
        return blocks.transpose(1, 2).reshape(-1, inputs) / inputs


def _conflicts(settings: C3aSettings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    return divisor_conflicts("block_size", settings.block_size, targets, inputs=True)


FIXED: Fixed = {"bias": ("none",), "block_size_pattern": ({}, None), "init_weights": (True, ANY)}
METHOD = Method(
    peft=PeftSide("C3A", C3aSettings, same_names(block_size=256), FIXED, absent=frozenset({"exclude_modules"})),
    layer=C3a,
    tensors=("c3a_kernel",),
    is_linear=always_linear,
    conflicts=_conflicts,
)
