"""Wall time and CPU time of this process, and how long its threads waited for a processor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil

TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class CpuTimes:
    """Times in seconds. `wall`: elapsed time; `process`: CPU time of this process; `main`: CPU time of the calling
    thread. `waited`: how long threads were ready to run but had no processor, summed over threads; None if the system
    does not report this. `others`: CPU time of all other processes of the machine, and of other virtual machines; None
    if it was not measured."""

    wall: float = 0.0
    process: float = 0.0
    main: float = 0.0
    waited: float | None = 0.0
    others: float | None = 0.0

    def __add__(self, other: CpuTimes) -> CpuTimes:
        waited = None if self.waited is None or other.waited is None else self.waited + other.waited
        others = None if self.others is None or other.others is None else self.others + other.others
        return CpuTimes(self.wall + other.wall, self.process + other.process, self.main + other.main, waited, others)

    def since(self, start: CpuTimes) -> CpuTimes:
        """The times that passed since `start`."""
        waited = None if self.waited is None or start.waited is None else max(0.0, self.waited - start.waited)
        others = None if self.others is None or start.others is None else max(0.0, self.others - start.others)
        return CpuTimes(self.wall - start.wall, self.process - start.process, self.main - start.main, waited, others)


def cpu_times(tasks: Path = TASKS) -> CpuTimes:
    """The present values of all these clocks. Source of `waited`: Linux, Documentation/scheduler/sched-stats.rst,
    schedstat of a task."""
    try:
        texts = [(task / "schedstat").read_text(encoding="ascii") for task in tasks.iterdir()]
        ran, waited = (sum(int(text.split()[at]) for text in texts) for at in (0, 1))
    except (OSError, ValueError, IndexError):  # another system, or a thread that has just ended
        ran, waited = 0, 0
    process = time.process_time()
    return CpuTimes(
        time.monotonic(), process, time.thread_time(), waited / 1e9 if ran else None, busy_seconds() - process
    )


def busy_seconds() -> float:
    """CPU seconds that all programs of the machine have used, and the time that other virtual machines took."""
    times = psutil.cpu_times()
    idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is counted as user time too
    return float(sum(times) - sum(getattr(times, name, 0.0) for name in idle))


def process_seconds() -> float:
    """Seconds since this process was started, including the time to import libraries."""
    return max(0.0, time.time() - psutil.Process().create_time())
