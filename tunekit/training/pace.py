"""Checks whether a run on a CPU gets one processor for each of its threads. If not, prints a warning once. An adaptive
run then continues with fewer threads."""

import math

import torch

from tunekit.machine.cpu_times import CpuTimes
from tunekit.machine.devices import Devices
from tunekit.machine.threads import cpu_quota, processors
from tunekit.records import Reaction

WINDOW_SECONDS, WINDOW_STEPS = 15.0, 3  # a shorter burst of other programs is no reason to act
BEHIND = 0.75  # a run is behind if its main thread computes for less than this share of the time
EXPLAINED = 0.8  # share of the lost time that waiting for a processor, and other processes, must explain
MARK = "CPU seconds in"  # in every statement about the pace


def watch_pace(times: list[CpuTimes], step: int, devices: Devices, *, adaptive: bool, warned: bool) -> Reaction | None:
    """Check the CPU times of the last steps, after a few of them. If threads lacked processors, return a warning,
    unless the run has `warned`; an adaptive run continues with fewer threads, the same number on every rank."""
    threads = torch.get_num_threads()
    total, missing = sum(times, CpuTimes()), 0
    if total.wall >= WINDOW_SECONDS and len(times) >= WINDOW_STEPS:
        missing = missing_processors(total, threads)
        times.clear()
    here, missing = missing, devices.any(missing) if adaptive else missing
    fewer = max(1, threads - missing)
    what, cure = _statement(total, threads, fewer) if here else ("another rank lacked processors", "")
    if adaptive and fewer < threads:
        torch.set_num_threads(fewer)
        times.clear()
        return Reaction(what, f"training.threads: adaptive continues with {threads_text(fewer)}", step)
    return Reaction(what, cure, step) if here and not warned else None


def _statement(times: CpuTimes, threads: int, fewer: int) -> tuple[str, str]:
    """Returns a warning that threads lacked processors, with the cause; and the advice."""
    why = f"{threads_text(threads)} computed for {times.process:.0f} {MARK} {times.wall:.0f} seconds"
    if threads > (allowed := _allowed()):
        return (
            f"{why}: this process may use only {allowed:,} of the processors",
            f"start with training.threads: {allowed}",
        )
    cure = f", or start with training.threads: adaptive (or {fewer})" if threads > 1 else ""
    return f"{why}: other programs use the processors", f"close them{cure}"


def _allowed() -> int:
    """The number of processors that this process may use."""
    quota = cpu_quota()
    return processors() if quota is None else min(processors(), math.ceil(quota))


def threads_text(count: int) -> str:
    """The number of threads in words."""
    return "1 thread" if count == 1 else f"{count:,} threads"


def missing_processors(times: CpuTimes, threads: int) -> int:
    """The average number of threads that had no processor, over some steps; 0 if this did not slow the run down.

    At the end of each matrix product, all threads wait for the slowest one. So the CPU time of the main thread shows
    the lost time. The CPU time of all threads does not show it: it is low in every run with small products. Unless this
    process has more threads than processors, other processes must have used the lost time: a thread may also wait for a
    processor on which another thread of this process runs.
    """
    lost = times.wall - times.main
    if lost <= (1 - BEHIND) * times.wall:
        return 0
    if times.others is not None and times.others < EXPLAINED * lost and threads <= _allowed():
        return 0
    if times.waited is None:
        missing = threads - times.process / times.wall
    elif times.waited < EXPLAINED * lost:
        return 0
    else:
        missing = times.waited / times.wall
    return min(max(1, round(missing)), threads)
