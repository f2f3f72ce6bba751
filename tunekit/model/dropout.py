"""Faster dropout on a CPU, with 16-bit random numbers from numpy's SFC64 generator. torch draws larger numbers from a
slower generator (8 ns per element, measured on a busy core). The dropout rate is rounded to a multiple of 2^-16, and
the scale of the other elements matches the rounded rate.

numpy's generator is seeded by one number from torch's generator, which is seeded for each layer. A recomputed layer
therefore drops the same elements.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 2**16


def quicken_dropout(net: nn.Module) -> None:
    """Replace the forward of all dropout modules of a net by the faster dropout of this file, which works on a CPU."""
    for module in net.modules():
        if type(module) is nn.Dropout and 0 < module.p < 1:
            module.forward = partial(_dropped, module)  # type: ignore[method-assign]


def _dropped(module: nn.Dropout, x: Tensor) -> Tensor:
    if not module.training or x.device.type != "cpu":
        return F.dropout(x, module.p, module.training)
    return x * dropout_noise(x, module.p)


def dropout_noise(x: Tensor, rate: float) -> Tensor:
    """A factor for each element of x: 0 with probability `rate`, otherwise 1 / (1 - rate)."""
    if x.is_meta:
        return torch.empty_like(x)
    count, dropped = x.numel(), round(rate * LEVELS)
    seed = int(torch.randint(2**62, ()))
    numbers = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count]
    remains = torch.from_numpy(numbers).view(x.shape) >= dropped - LEVELS // 2
    scale = torch.tensor(LEVELS / (LEVELS - dropped), dtype=x.dtype)
    return torch.where(remains, scale, torch.zeros((), dtype=x.dtype))
