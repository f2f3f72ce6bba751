"""C3A.  Comes in: a linear layer or a Conv1D, packed or not.  Next: attach.py, folder.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.fft import irfft, rfft

from tunekit.adapters.base import LayerAdapter, Slot
from tunekit.adapters.blocks.divisors import undivided
from tunekit.adapters.folder.fields import ANY, PeftSide
from tunekit.adapters.method import Method, Misfit
from tunekit.recipe.adapters.c3a import C3aSettings
from tunekit.records import Target


class C3a(LayerAdapter):
    """Circulant blocks: y = W x + D x, D of blocks of side S with block[i, j] = k[(j - i) mod S] / I.

    Shapes: x (..., I) -> y (..., O); kernels k (O / S, I / S, S).    Starts as the identity: k = 0.
    The product is taken through float32 Fourier transforms along S.    Source: Chen et al. 2025, eq. 5.
    """

    settings: C3aSettings
    kernels: nn.Parameter

    @classmethod
    def slots(cls, settings: C3aSettings, target: Target) -> dict[str, Slot]:
        side = settings.block_size
        return {"kernels": Slot("c3a_kernel", (target.out_features // side, target.in_features // side, side))}

    def initialise(self, generator: Generator) -> None:
        nn.init.zeros_(self.kernels)

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)  # (..., O)
        side = self.settings.block_size
        pieces = rfft(x.float().reshape(*x.shape[:-1], -1, side))  # (..., I / S, S / 2 + 1)
        kernels = rfft(self.kernels).conj()  # (O / S, I / S, S / 2 + 1)
        products = torch.einsum("...nf,mnf->...mf", pieces, kernels)
        update: Tensor = irfft(products, n=side).flatten(start_dim=-2) / self.target.in_features  # (..., O)
        return y + update.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        kernels, side = self.kernels.detach(), self.settings.block_size
        steps = torch.arange(side, device=kernels.device)
        blocks = kernels[:, :, (steps[None] - steps[:, None]) % side]  # (O / S, I / S, S, S)
        delta = blocks.transpose(1, 2).reshape(weight.shape) / self.target.in_features
        return weight + delta.to(weight.device), bias


def _misfits(settings: C3aSettings, targets: Sequence[Target], file: bool) -> list[Misfit]:
    return undivided("block_size", settings.block_size, targets, inputs=True)


FIELDS = {"block_size": ("block_size", 256), "target_modules": ("target_modules", None)}
FIXED: dict[str, tuple[Any, ...]] = {"bias": ("none",), "block_size_pattern": ({}, None), "init_weights": (True, ANY)}
METHOD = Method(
    peft=PeftSide("C3A", C3aSettings, FIELDS, FIXED, absent=frozenset({"exclude_modules"})),
    layer=C3a,
    misfits=_misfits,
)
