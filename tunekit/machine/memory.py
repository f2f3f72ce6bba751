"""How much memory a device has left for this process, and how much the process has.

Comes in: a device.  Goes out: bytes, or None where the system does not tell.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tunekit.machine.devices import is_here, kind_of

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

KIB = 1024
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of a GPU; of the host what can be had without swapping, inside this process's control group. Of
    memory that both have, what either may still take."""
    if kind_of(device).own_memory:
        module = torch.get_device_module(device)
        try:
            return int(module.mem_get_info(device)[0])
        except RuntimeError:  # some Intel Arc do not tell what is free: then all that this process has not taken
            return int(module.get_device_properties(device).total_memory - module.memory_reserved(device))
    limits = [int(psutil.virtual_memory().available), _group_available()]
    if device.type == "mps" and is_here(device):
        limits.append(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min(limit for limit in limits if limit is not None)


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
    """All memory of a GPU, the same for every run on it; None for the host, and what shares its memory."""
    if not kind_of(device).own_memory:
        return None
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)


def limit_bytes(device: torch.device, budget: int) -> None:
    """Let a GPU's allocator fail at the budget rather than go beyond it; the host has no such limit."""
    total, module = total_bytes(device), torch.get_device_module(device)
    if total is not None and hasattr(module, "set_per_process_memory_fraction"):  # torch.xpu has it from 2.10 on
        module.set_per_process_memory_fraction(min(1.0, budget / total), device)


@dataclass(frozen=True)
class DevicePeaks:
    """The most bytes that a device's allocator had asked for, rounded, and taken from the driver; None: not told."""

    requested: int | None = None
    allocated: int | None = None
    reserved: int | None = None


def device_peaks(device: torch.device) -> DevicePeaks:
    """Since the last reset. Metal's driver keeps no peak, but what it once took: that is `reserved`."""
    if kind_of(device).own_memory:
        known = torch.get_device_module(device).memory_stats(device)
        names = ("requested_bytes", "allocated_bytes", "reserved_bytes")
        return DevicePeaks(*(int(known.get(f"{name}.all.peak", 0)) for name in names))
    return DevicePeaks(reserved=torch.mps.driver_allocated_memory()) if device.type == "mps" else DevicePeaks()


def reset_peaks(device: torch.device) -> None:
    """Begin new peaks at what is allocated now."""
    if kind_of(device).own_memory:
        torch.get_device_module(device).reset_peak_memory_stats(device)


def release_cached() -> None:
    """Give the driver back what the accelerator's allocator keeps and nothing uses."""
    if torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()


def resident_bytes() -> int:
    """What of this process is in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_host_bytes(status: Path = STATUS) -> int:
    """The most memory this process ever had: VmHWM on Linux, elsewhere the peak from getrusage, or psutil's on Windows.

    VmHWM comes first because ru_maxrss is inherited over exec: a small program started by a large one would report the
    large one's peak as its own.
    """
    with contextlib.suppress(OSError, ValueError):
        return status_bytes("VmHWM", status)
    if resource is None:
        now = psutil.Process().memory_info()
        return int(getattr(now, "peak_wset", now.rss))
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


def machine_memory_bytes() -> int:
    """The machine's memory."""
    return int(psutil.virtual_memory().total)


@contextlib.contextmanager
def address_space_limit(extra_bytes: int) -> Iterator[None]:
    """A block in which no allocation goes beyond what the process has now and `extra_bytes` more. Only on Linux: other
    systems have no such limit, or do not keep it.

    None outside the main thread: the limit is the whole process's, and the others may be making answers meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        limit = _address_space_bytes() + extra_bytes
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        known = [value for value in (limit, soft, hard) if value != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int:
    """Read without Python's streams or psutil: it is asked for every row, twice. Raises: OSError."""
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(file)
