"""Sets the number of computing threads, and how they wait for each other. It does not import torch, because the OpenMP
library reads these settings when torch loads it."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

COUNT = "OMP_NUM_THREADS"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # if one is set, the user has chosen
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
GROUPS, CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")


def thread_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for the OpenMP library: how threads wait; and the number of threads, if a CPU quota allows
    fewer than one per core (torch's default). Variables that the user has set are left out.

    By default, a thread that waits keeps its core busy (spins). If another program needs the core, all threads are
    slowed down.
    """
    settings = {} if any(name in environment for name in WAITING) else dict(PASSIVE)
    quota = cpu_quota()
    if quota is not None and COUNT not in environment and math.ceil(quota) < cores():
        settings[COUNT] = str(math.ceil(quota))
    return settings


def processors() -> int:
    """The number of processors that this process may use, even if other programs use them too."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores(topology: Path = TOPOLOGY) -> int:
    """The number of CPU cores that this process may use. Several processors of the same core (hyper-threads) count
    once, if the system reports which core they belong to."""
    if not hasattr(os, "sched_getaffinity"):
        return processors()
    try:
        return len({_siblings(topology, number) for number in os.sched_getaffinity(0)})
    except OSError:
        return processors()


def _siblings(topology: Path, number: int) -> str:
    return (topology / f"cpu{number}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()


def cpu_quota(groups: Path = GROUPS, mounts: Path = CGROUP) -> float | None:
    """The number of processors that the control groups of this process allow, such as 1.5; None without a limit.

    The limits of all parent groups apply too. In version 2 of control groups there is one tree of groups; in version 1,
    the CPU has a separate tree.
    """
    folders = group_folders("cpu", groups, mounts)
    return min((quota for folder in folders if (quota := _quota(folder)) is not None), default=None)


def group_folders(controller: str, groups: Path, mounts: Path) -> Iterator[Path]:
    """The folders of this process's control groups and of their parent groups. `controller`: cpu or memory. `groups`:
    a file of lines hierarchy:controllers:path, see cgroups(7); without it, there are no folders.

    In a container, the path may be a path of the host. Then only the last of these folders, the root of the mount,
    exists.
    """
    with suppress(OSError):
        for line in groups.read_text(encoding="utf-8", errors="replace").splitlines():
            yield from _folders_of(line, controller, mounts)


def _folders_of(line: str, controller: str, mounts: Path) -> Iterator[Path]:
    _, _, entry = line.partition(":")
    controllers, _, path = entry.partition(":")
    if controllers and controller not in controllers.split(","):
        return
    roots = {mounts / controllers, mounts / controller} if controllers else {mounts, mounts / "unified"}
    group = PurePosixPath(path.lstrip("/"))
    for root in roots:
        for place in (group, *group.parents):
            yield root / place


def _quota(folder: Path) -> float | None:
    """The quota of one control group, as a number of processors; None without a limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (_number(folder, name) for name in ("quota", "period"))
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _number(folder: Path, name: str) -> str:
    return (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
