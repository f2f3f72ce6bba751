"""Sets the number of computing threads, and how they wait for each other. Imports no torch, because the OpenMP library
reads its settings when torch loads it.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

COUNT = "OMP_NUM_THREADS"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # if one is set, the user has chosen
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
GROUPS, CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")


def thread_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for the OpenMP library, except those that the user has set: how threads wait, and their
    number if a CPU quota allows fewer than torch's default of one per core.

    By default a thread spins between two matrix products. If another program needs its core, all threads wait for it.
    """
    settings = {} if any(name in environment for name in WAITING) else dict(PASSIVE)
    quota = cpu_quota()
    if quota is not None and COUNT not in environment and math.ceil(quota) < cores():
        settings[COUNT] = str(math.ceil(quota))
    return settings


def processors() -> int:
    """The number of processors that this process may run on, whether or not other programs use them too."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores(topology: Path = TOPOLOGY) -> int:
    """The number of cores with the processors that this process may run on. Processors that share a core count once,
    if the system reports this."""
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

    The parent groups limit a group too. Version 2 of control groups has one tree of groups, version 1 has a tree for
    the CPU.
    """
    try:
        lines = groups.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    quotas = (quota for line in lines for folder in _folders(line, mounts) if (quota := _quota(folder)) is not None)
    return min(quotas, default=None)


def _folders(line: str, mounts: Path) -> Iterator[Path]:
    """The folders of a control group and of its parent groups. `line`: hierarchy:controllers:path, see cgroups(7).

    In a container this may be the host's path. Then only the last folder, the root of the mount, exists.
    """
    _, _, entry = line.partition(":")
    controllers, _, path = entry.partition(":")
    if controllers and "cpu" not in controllers.split(","):
        return
    roots = {mounts / controllers, mounts / "cpu"} if controllers else {mounts, mounts / "unified"}
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
