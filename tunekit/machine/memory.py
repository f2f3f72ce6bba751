"""How much memory a device has left for this process.

Comes in: a device.  Goes out: bytes, or None where the system does not tell.  Next: plan.py.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

KIB = 1024
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of a GPU; of the host what can be had without swapping, inside this process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    limits = [limit for limit in (_host_available(), _group_available()) if limit is not None]
    return min(limits, default=None)


def _host_available(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * KIB
    except (OSError, ValueError, IndexError):
        pass
    return None


def _group_available(root: Path = CGROUP) -> int | None:
    """What the control group's limit leaves; its file cache can be given back and does not count as used."""
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((root / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(limit) - used + int(statistics.get("file", "0")))
    except (OSError, ValueError):
        return None


def total_bytes(device: torch.device) -> int | None:
    """All memory of a GPU, the same for every run on it; None for the host."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def limit_bytes(device: torch.device, budget: int) -> None:
    """Let a GPU's allocator fail at the budget rather than go beyond it; the host has no such limit."""
    total = total_bytes(device)
    if total is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


@dataclass(frozen=True)
class HostMemory:
    """`resident_bytes`: in memory now (None where the system does not tell); `peak_bytes`: the most there ever was."""

    resident_bytes: int | None
    peak_bytes: int


def read_host_memory(status: Path = Path("/proc/self/status")) -> HostMemory:
    """VmRSS and VmHWM on Linux; elsewhere the peak from getrusage alone.

    VmHWM is read first because ru_maxrss is inherited over exec: a small program started by a large one would report
    the large one's peak as its own.
    """
    values = {}
    try:
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                values[name] = int(rest.split()[0]) * KIB
    except (OSError, ValueError, IndexError):
        values = {}
    if "VmHWM" in values:
        return HostMemory(values.get("VmRSS"), values["VmHWM"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return HostMemory(None, peak if sys.platform == "darwin" else peak * KIB)


def peak_host_bytes() -> int:
    """The most memory this process ever had."""
    return read_host_memory().peak_bytes
