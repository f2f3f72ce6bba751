"""How fast this machine multiplies and how fast it copies: what decides whether streamed weights arrive in time.

Comes in: a device, the dtype and width of the products, a tensor of the base.  Goes out: Rates, measured on the spot in
a fraction of a second.  Next: plan.py prints what follows from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.memory.copying import copy_bytes

MEASURED_BYTES = 64 * 2**20
ROWS = {"cpu": 512, "cuda": 8192}
REPEATS = 3


@dataclass(frozen=True)
class Rates:
    """Floating-point operations and bytes, each per second."""

    flops: float
    copied_bytes: float


def measure_rates(device: torch.device, dtype: torch.dtype, width: int, source: Tensor) -> Rates:
    """The best of a few products (rows, D) x (D, D), and of a few copies of `source` (host memory, or a mapped file) to
    the device."""
    rows = ROWS.get(device.type, ROWS["cpu"])
    left = torch.ones(rows, width, dtype=dtype, device=device)  # (rows, D)
    right = torch.ones(width, width, dtype=dtype, device=device)  # (D, D)
    product_seconds = _seconds(lambda: torch.mm(left, right), device)
    part = source.reshape(-1).view(torch.uint8)[:MEASURED_BYTES]  # (bytes,)
    if device.type == "cuda":
        pinned = part.pin_memory()
        target = torch.empty_like(part, device=device)
        copy_seconds = _seconds(lambda: target.copy_(pinned, non_blocking=True), device)
    else:
        target = torch.empty_like(part)
        copy_seconds = _seconds(lambda: copy_bytes(target, part), device)
    return Rates(2.0 * rows * width * width / product_seconds, part.numel() / copy_seconds)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least time of a few runs, after one that warms up."""
    found = []
    for _ in range(REPEATS + 1):
        started = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.monotonic() - started)
    return max(min(found[1:]), 1e-9)
