"""How much memory a device has left for this process, and how much the process has.

Comes in: a device.  Goes out: bytes, or None where the system does not tell.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import psutil
import torch

KIB = 1024
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of a GPU; of the host what can be had without swapping, inside this process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    host, group = int(psutil.virtual_memory().available), _group_available()
    return host if group is None else min(host, group)


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


def resident_bytes() -> int:
    """What of this process is in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_host_bytes(status: Path = STATUS) -> int:
    """The most memory this process ever had: VmHWM on Linux, elsewhere the peak from getrusage.

    VmHWM comes first because ru_maxrss is inherited over exec: a small program started by a large one would report the
    large one's peak as its own.
    """
    with contextlib.suppress(OSError, ValueError):
        return status_bytes("VmHWM", status)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


def status_bytes(name: str, status: Path = STATUS) -> int:
    """A number of this process that only the Linux kernel's status file has: VmHWM, RssAnon, RssFile.

    Raises: OSError or ValueError where it has not.
    """
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * KIB
    raise ValueError(f"{status} does not say {name}")


def address_space_bytes() -> int:
    """The address space of this process. Read without Python's streams or psutil: it is asked for every row, twice.

    Raises: OSError where the system does not tell.
    """
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(file)
