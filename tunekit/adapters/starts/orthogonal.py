"""Orthogonal initialisation of LoRA: A and B are not 0, but B A is."""

import torch
from torch import Tensor

from tunekit.adapters.starts.start import StartLayer

SHRINK = 10.0  # PEFT's value


def make_start(settings: object, layer: StartLayer[object]) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) with B A = 0 although neither is 0. R is even.

    With Q (R, R) orthogonal: A = Q_even^T N / 10, B = N' Q_odd / 10, N and N' normal; Q_odd Q_even^T = 0. Source:
    datta0.github.io/posts/rethink-lora-init.
    """
    rank, generator = layer.rank, layer.generator
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))  # (R, R)
    a = q[0::2].t() @ torch.randn(rank // 2, layer.inputs, generator=generator) / SHRINK
    return a, torch.randn(layer.outputs, rank // 2, generator=generator) @ q[1::2] / SHRINK
