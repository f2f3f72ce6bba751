"""How much memory a device has left for this process.

Comes in: a device.  Goes out: bytes, or None where the system does not tell.  Next: plan.py.
"""

from __future__ import annotations

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
