"""How fast this machine multiplies and how fast it copies: what decides whether streamed weights arrive in time.

Comes in: a device, the dtype and width of the products, a file of the base.  Goes out: Rates, measured on the spot in a
fraction of a second and a few megabytes.  Next: training/streamed.py.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tunekit.memory.copies import copy_bytes

READ_BYTES, CHUNK_BYTES = 64 * 2**20, 4 * 2**20
COPIED_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
ROWS = {"cpu": 512, "cuda": 8192}
REPEATS = 3


@dataclass(frozen=True)
class Rates:
    """Floating-point operations and bytes, each per second."""

    flops: float
    copied_bytes: float


def measure_rates(device: torch.device, dtype: torch.dtype, width: int, file: Path | None) -> Rates:
    """The best of a few products (rows, D) x (D, D), and of a few copies to the device.

    With a `file`, copies are no faster than it is read: from the system's cache, if it is there.
    """
    rows = ROWS[device.type]
    left = torch.ones(rows, width, dtype=dtype, device=device)  # (rows, D)
    right = torch.ones(width, width, dtype=dtype, device=device)  # (D, D)
    flops = 2.0 * rows * width * width / _seconds(lambda: torch.mm(left, right), device)
    copied = _copied_bytes(device)
    if file is not None:
        copied = min(copied, _read_bytes(file))
    return Rates(flops, copied)


def _copied_bytes(device: torch.device) -> float:
    count = COPIED_BYTES[device.type]
    source = torch.ones(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(count, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        return count / _seconds(lambda: target.copy_(source, non_blocking=True), device)
    return count / _seconds(lambda: copy_bytes(target, source), device)


def _read_bytes(file: Path) -> float:
    """Bytes per second of reading the file's first part; the first reading counts too, since it may be the disk's."""
    buffer, done = bytearray(CHUNK_BYTES), 0
    started = time.monotonic()
    descriptor = os.open(file, os.O_RDONLY)
    try:
        while done < READ_BYTES and (count := os.readv(descriptor, [buffer])):
            done += count
    finally:
        os.close(descriptor)
    if done < CHUNK_BYTES:  # too little to tell: its time is that of opening it
        return math.inf
    return done / max(time.monotonic() - started, 1e-9)


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
