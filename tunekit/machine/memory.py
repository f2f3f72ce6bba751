"""Available, total and peak memory of devices and of this process; None if the system does not report a number."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tunekit.machine.cards import Card, planned_card
from tunekit.machine.devices import is_here, kind_of
from tunekit.machine.threads import CGROUP, GROUPS, group_folders

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

KIB = 1024
CONTEXT_BYTES = 2**29  # that the driver's context takes of a card's memory, with the libraries' kernels
STATUS = Path("/proc/self/status")
CLEAR_REFERENCES = Path("/proc/self/clear_refs")


def _card(device: torch.device) -> Card | None:
    """The card of --card, if a plan is made for it."""
    return planned_card() if device.type == "cuda" else None


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device, in bytes; memory that this process's allocator has cached is free. For a CPU: the memory
    that is available without swapping, within the limit of this process's control group. For Metal: also within the
    limit of the GPU."""
    if (card := _card(device)) is not None:
        return card.total_bytes - CONTEXT_BYTES
    if kind_of(device).own_memory:
        module = torch.get_device_module(device)
        try:
            free = int(module.mem_get_info(device)[0])
        # some Intel Arc GPUs do not report free memory
        except RuntimeError:
            free = int(module.get_device_properties(device).total_memory - module.memory_reserved(device))
        return free + module.memory_reserved(device) - module.memory_allocated(device)
    limits = [int(psutil.virtual_memory().available), _group_available()]
    if device.type == "mps" and is_here(device):
        limits.append(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min(limit for limit in limits if limit is not None)


def _group_available(groups: Path = GROUPS, mounts: Path = CGROUP) -> int | None:
    """Free bytes within the memory limits of this process's control group and of its parent groups; None without a
    limit. Jobs of SLURM, services and containers have such limits."""
    folders = group_folders("memory", groups, mounts)
    return min((free for folder in folders if (free := _free_bytes_in(folder)) is not None), default=None)


def _free_bytes_in(group: Path) -> int | None:
    """Free bytes within the limit of one control group of version 2 or 1; None without a limit. The group's file cache
    can be reclaimed, so it counts as free."""
    names = ("memory.max", "memory.current", "file", "shmem")
    if not (group / names[0]).exists():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in names[:2])
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        cached, shared = (int(statistics.get(name, "0")) for name in names[2:])
        return None if limit == "max" else max(0, int(limit) - int(used) + cached - shared)
    except (OSError, ValueError):
        return None


def total_bytes(device: torch.device) -> int | None:
    """The total memory of a GPU; None for the CPU and for devices that share the CPU's memory."""
    if not kind_of(device).own_memory:
        return None
    if (card := _card(device)) is not None:
        return card.total_bytes
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)


def limit_bytes(device: torch.device, budget: int) -> None:
    """Make a GPU's allocator fail instead of exceeding the budget. On a CPU, this function has no effect."""
    total, module = total_bytes(device), torch.get_device_module(device)
    if total is not None and hasattr(module, "set_per_process_memory_fraction"):  # torch.xpu has it since 2.10
        module.set_per_process_memory_fraction(min(1.0, budget / total), device)


@dataclass(frozen=True)
class DevicePeaks:
    """Peaks of a device's allocator in bytes: requested, allocated (rounded) and reserved from the driver; None: not
    reported."""

    requested: int | None = None
    allocated: int | None = None
    reserved: int | None = None


def device_peaks(device: torch.device) -> DevicePeaks:
    """The peaks since the last reset. Metal does not record peaks; only the bytes that are reserved now are
    reported."""
    if kind_of(device).own_memory:
        known = torch.get_device_module(device).memory_stats(device)
        names = ("requested_bytes", "allocated_bytes", "reserved_bytes")
        return DevicePeaks(*(int(known.get(f"{name}.all.peak", 0)) for name in names))
    return DevicePeaks(reserved=torch.mps.driver_allocated_memory()) if device.type == "mps" else DevicePeaks()


def reset_peaks(device: torch.device) -> None:
    """Reset the recorded peaks of a GPU's allocator to the memory that is allocated now."""
    if kind_of(device).own_memory:
        torch.get_device_module(device).reset_peak_memory_stats(device)


def release_cached() -> None:
    """Give unused cached memory of the accelerator's allocator back to the driver."""
    if torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_host_bytes(status: Path = STATUS) -> int:
    """Peak memory of this process. Source: VmHWM on Linux; psutil on Windows; otherwise getrusage.

    VmHWM is preferred because exec passes ru_maxrss on to the new program: a small program that a large one starts
    would report the large one's peak.
    """
    with contextlib.suppress(OSError, ValueError):
        return status_bytes("VmHWM", status)
    if resource is None:
        now = psutil.Process().memory_info()
        return int(getattr(now, "peak_wset", now.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


def reset_host_peak() -> None:
    """Reset the peak of this process's memory to the memory in use. Only Linux can do this."""
    with contextlib.suppress(OSError):
        CLEAR_REFERENCES.write_text("5", encoding="ascii")  # 5: the peak, and nothing else


def status_bytes(name: str, status: Path = STATUS) -> int:
    """A memory size of this process from Linux's status file. `name`: VmHWM, RssAnon or RssFile.

    Raises: OSError or ValueError if the size is missing.
    """
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * KIB
    raise ValueError(f"{status} does not contain {name}")


_address_space = threading.Lock()


@contextlib.contextmanager
def address_space_limit(extra_bytes: int) -> Iterator[None]:
    """A context manager: inside the block, the process's address space can grow by at most `extra_bytes`. Only on
    Linux: other systems have no such limit or do not enforce it.

    The limit applies to the whole process, so one block at a time sets it. Other threads, which may be generating
    answers, allocate much less than this in the few milliseconds of a block.
    """
    with _address_space:
        yield from _limited_to(extra_bytes)


def _limited_to(extra_bytes: int) -> Iterator[None]:
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
    """The size of this process's address space. Called twice per row, so it is fast: it avoids Python's streams and
    psutil. Raises: OSError."""
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(file)
