"""How much memory this process has and had, as the system counts it.

Comes in: nothing.  Goes out: bytes.  Next: training/ and the report.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

KIB = 1024


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
