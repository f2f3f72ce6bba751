"""Runs a command in a fresh process on one core, and samples its CPU time, its resident memory and the ends of its
steps.

The process appends a line to a log after each optimizer step. Every 10 ms this reads user and system time, anonymous
and file memory, and the log's new lines. CPU time of a step is read when its line is seen. The peak is the kernel's
ru_maxrss. Both sides of a comparison are measured by this file.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from pathlib import Path

import psutil

PERIOD_SECONDS, KEPT_SECONDS = 0.01, 0.25  # between samples; between those that are kept for the plot
MOST_MEMORY = 0.85  # of the machine's: a process that wants more is told so, before the system ends another one
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TUNEKIT_DEVICE": "cpu",
    "PYTHONUNBUFFERED": "1",
}


def watch(argv: list[str], log: Path, output: Path, *, core: int, environment: dict[str, str] | None = None) -> dict:
    """Run the command, and return its measurements. Raises: RuntimeError with the end of its output if it fails."""
    log.unlink(missing_ok=True)
    started = time.monotonic()
    with output.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            argv,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            preexec_fn=lambda: _confine(core),
        )
        found = _sample(process.pid, log, started)
    if found.pop("status"):
        raise RuntimeError(f"{' '.join(argv)}\n{output.read_text('utf-8', errors='replace')[-3000:]}")
    return {"argv": argv, **found}


def _confine(core: int) -> None:
    """Set core and limits in the new process, before its program starts."""
    os.sched_setaffinity(0, {core})
    most = int(MOST_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _sample(pid: int, log: Path, started: float) -> dict:
    steps: list[dict[str, float]] = []
    samples: list[list[float]] = []
    most = {"RssAnon": 0, "RssFile": 0, "both": 0}
    watched = psutil.Process(pid)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        now = time.monotonic() - started
        memory = {} if done else _memory(watched)
        cpu = usage.ru_utime + usage.ru_stime if done else _cpu_seconds(watched)
        for _ in range(_lines(log) - len(steps)):
            steps.append({"cpu_seconds": cpu, "wall_seconds": now, "anonymous_bytes": memory.get("RssAnon", 0)})
        if done:
            break
        if memory:
            memory["both"] = memory["RssAnon"] + memory["RssFile"]
            most = {name: max(value, memory[name]) for name, value in most.items()}
            if not samples or now - samples[-1][0] >= KEPT_SECONDS:
                samples.append([round(now, 3), memory["RssAnon"], memory["RssFile"]])
        time.sleep(PERIOD_SECONDS)
    return {
        "status": status,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": now,
        "peak_bytes": usage.ru_maxrss * 1024,
        "most_sampled_bytes": most,
        "steps": steps,
        "samples": samples,
    }


def _memory(process: psutil.Process) -> dict[str, int]:
    """The process's bytes of anonymous memory and of mapped files; empty if the process has just ended."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return {}
    return {"RssAnon": memory.rss - memory.shared, "RssFile": memory.shared} if memory.rss else {}


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def _lines(log: Path) -> int:
    try:
        return log.read_bytes().count(b"\n")
    except OSError:
        return 0
