"""OLoRA initialisation of LoRA: A and B are a part of the QR decomposition of W."""

import torch
from torch import Tensor

from tunekit.adapters.starts.start import StartLayer


def make_start(settings: object, layer: StartLayer[object]) -> tuple[Tensor, Tensor]:
    """B (O, R) = the first R columns of Q and A (R, I) = the first R rows of R, W = Q R.

    Source: Büyükakyüz 2024, algorithm 1.
    """
    q, r = torch.linalg.qr(layer.weight())  # (O, min), (min, I)
    return r[: layer.rank], q[:, : layer.rank]
