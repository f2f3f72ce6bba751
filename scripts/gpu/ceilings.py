"""Measures the highest speeds of the card: matrix products (8192^3 and a model's real shapes), copies on the device,
and copies from pinned host memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UPS, REPEATS, INPUT_SETS = 3, 20, 3
REAL_TOKENS = 16384


def timed(work: Callable[[int], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median seconds of `work(number)`, by device events on CUDA."""
    for number in range(WARM_UPS):
        work(number)
    found = []
    for number in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work(number)
            stop.record()
            stop.synchronize()
            found.append(start.elapsed_time(stop) / 1000.0)
        else:
            started = time.perf_counter()
            work(number)
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def product_flops(tokens: int, inputs: int, outputs: int, device: torch.device) -> float:
    """Operations per second of (tokens, inputs) x (outputs, inputs)^T in bf16, random values, several input sets."""
    sets = [
        (
            torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16),
            torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16),
        )
        for _ in range(INPUT_SETS)
    ]
    output = torch.empty(tokens, outputs, device=device, dtype=torch.bfloat16)

    def multiply(number: int) -> None:
        x, w = sets[number % INPUT_SETS]
        torch.mm(x, w.t(), out=output)

    return 2.0 * tokens * inputs * outputs / timed(multiply, device)


def copied_bytes(size: int, device: torch.device) -> float:
    """Bytes per second of a copy on the device; bytes read and bytes written are added."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / timed(lambda _: target.copy_(source), device)


def bus_bytes(size: int, device: torch.device, *, to_device: bool, pinned: bool) -> float:
    """Bytes per second between the host and the device."""
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned and device.type == "cuda")
    own = torch.zeros(size, dtype=torch.uint8, device=device)
    source, target = (host, own) if to_device else (own, host)
    return size / timed(lambda _: target.copy_(source, non_blocking=pinned), device, 10)


def measure_ceilings(
    device: torch.device, shapes: dict[str, tuple[int, int]], *, small: bool = False
) -> dict[str, Any]:
    """All speeds. `shapes`: (inputs, outputs) of a model's matrices by name; `small`: for the double on a CPU."""
    side, tokens, size = (256, 128, 2**22) if small else (8192, REAL_TOKENS, 2**30)
    return {
        "product_flops": product_flops(side, side, side, device),
        "product_side": side,
        "real_products": {
            name: {"tokens": tokens, "inputs": inputs, "outputs": outputs,
                   "flops": product_flops(tokens, inputs, outputs, device)}
            for name, (inputs, outputs) in shapes.items()
        },
        "copy_bytes": copied_bytes(size, device),
        "host_to_device_bytes": bus_bytes(size, device, to_device=True, pinned=True),
        "host_to_device_pageable_bytes": bus_bytes(size, device, to_device=True, pinned=False),
        "device_to_host_bytes": bus_bytes(size, device, to_device=False, pinned=True),
    }  # fmt: skip
