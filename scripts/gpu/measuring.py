"""Measures the memory of the process while a row (a measured run) runs, and computes speeds."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from shapes import Row

INTERVAL_SECONDS = 0.01
FIRST_COUNTED = 3  # steps before it warm up


class HostMemory(threading.Thread):
    """Samples the anonymous memory of this process. Pinned memory is included if the system counts it as anonymous."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_anonymous_bytes = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.is_set():
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous_bytes())
            self._done.wait(INTERVAL_SECONDS)

    def finish(self) -> int:
        """The most there was."""
        self._done.set()
        self.join()
        return max(self.peak_anonymous_bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """The bytes of this process's memory that are neither files nor shared."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def cap_memory(row: Row, device: torch.device) -> None:
    """Let the process use no more than row.cap_bytes of the card."""
    if row.cap_bytes is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, row.cap_bytes / total), device)


def device_peaks(device: torch.device) -> dict[str, int]:
    """Peak bytes allocated and reserved since the last reset; empty on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def reset_peaks(device: torch.device) -> dict[str, int]:
    """Reset the peaks; returns the peaks so far, which are those of loading."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    before = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return {"load_peak_allocated_bytes": before}


def speeds(tokens: Sequence[int], supervised: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """Tokens per second, of all non-padding and of supervised tokens: median and minimum over the steps from
    FIRST_COUNTED on."""
    counted = range(min(FIRST_COUNTED - 1, len(seconds) - 1), len(seconds))
    rates = [tokens[step] / seconds[step] for step in counted]
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_least": min(rates),
        "supervised_tokens_per_second": statistics.median(supervised[step] / seconds[step] for step in counted),
        "step_seconds": list(seconds),
    }
