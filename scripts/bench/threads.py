"""Measures speed and CPU time of the quickstart's training steps, by number of threads, wait policy and number of busy
neighbours (programs that use a processor all the time).

    scripts/bench/run threads --model FOLDER [--before CHECKOUT] [--sides NAME,...] [--neighbours 0,1] [--rounds 3]
                          [--again]

All sides are started first and then stopped (SIGSTOP). In each round every side continues for some steps, alone or next
to programs that use a processor all the time. So sides are compared within seconds of each other. Rounds are added to
scripts/results/threads.json, so the measurement can be made in pieces; --again starts with none. The page is
threads.md. A turn during which other programs used more than a tenth of a processor is recorded but not counted. On a
machine with other programs, as root: with --nice -20 the runs and the neighbours have priority over other sessions, and
with --realtime a run without neighbours has priority over everything else. Then the turns count in any case. Linux
only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

FIGURES = {
    "minutes": 12,
    "options": "--again --model $TUNEKIT_SMOLLM2",
    "result": "threads.json",
    "figures": {
        "idle": {
            "what": "the quickstart with two threads, idle: with our wait policy against torch's own",
            "unit": "tokens per second",
            "ours": "speeds/2 threads/0",
            "theirs": "speeds/2 threads, spin 300000/0",
        },
        "busy": {
            "what": "the quickstart with two threads next to a busy program: with our wait policy against torch's own",
            "unit": "tokens per second",
            "ours": "speeds/2 threads/1",
            "theirs": "speeds/2 threads, spin 300000/1",
        },
    },
}
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results" / "threads.json"
PAGE = RESULTS.with_suffix(".md")
PERIOD_SECONDS, LONGEST_TURN, LONGEST_START = 0.002, 90.0, 240.0
QUIET = 0.1  # processors that other programs may use during a counted turn
SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_")  # of the caller's environment, which no side gets
RUN = (
    "~training.epochs",
    "training.max_steps=100000",
    "training.scheduler=constant",
    "training.save_steps=100000",
    "data.eval=null",
)
BUSY = "while True: pass"
INTRODUCTION = """# Threads

Training steps of the quickstart (8 rows a step), made by `scripts/bench/run threads`: medians and ranges of turns of a
few steps. A busy neighbour is a program that uses a processor all the time. `before` is the commit of `--before`, and
the other sides are this version, with the wait policy in their name or the one that it chooses (PASSIVE; a spin is a
GOMP_SPINCOUNT, of which torch's own default is 300,000)."""
PRIORITY = """

Other programs ran on the machine. The runs and the neighbour had priority over them, and without a neighbour real-time
priority. Other programs still used the caches and the memory, so speeds vary between turns; sides were compared within
seconds of each other. A single thread shared its processor with the neighbour at times, because other programs were
waiting for the second processor."""


@dataclass(frozen=True)
class Side:
    """A way to run the quickstart: `before` runs the checkout of --before."""

    name: str
    threads: int
    environment: dict[str, str] = field(default_factory=dict)
    before: bool = False


SIDES = [
    Side("before, 1 thread", 1, {"OMP_NUM_THREADS": "1"}, before=True),
    Side("before, 2 threads", 2, before=True),
    Side("1 thread", 1, {"OMP_NUM_THREADS": "1"}),
    Side("2 threads", 2),
    Side("2 threads, PASSIVE", 2, {"OMP_WAIT_POLICY": "PASSIVE"}),
    *(Side(f"2 threads, spin {count}", 2, {"GOMP_SPINCOUNT": str(count)}) for count in (1_000, 10_000, 300_000)),
]


class Running:
    """A training run of one side, which is stopped between its turns."""

    def __init__(self, side: Side, folder: Path, model: str, output: Path) -> None:
        self.side, self.log = side, output / "metrics.jsonl"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
        environment |= {"PYTHONPATH": str(folder), "TUNEKIT_DEVICE": "cpu", **side.environment}
        recipe = [str(folder / "recipes" / "quickstart.yaml"), f"model.name_or_path={model}", f"output.dir={output}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tunekit", "train", *recipe, *RUN],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        self.watched = psutil.Process(self.process.pid)

    def tokens(self) -> list[int]:
        """The tokens of every finished step."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [json.loads(line)["tokens"] for line in lines]

    def wait(self, steps: int, seconds: float) -> int:
        """Wait until at least `steps` steps are finished, or for `seconds`; returns the number of finished steps.
        Raises: RuntimeError if the run has ended."""
        ends = time.monotonic() + seconds
        while (count := self.log.read_bytes().count(b"\n") if self.log.exists() else 0) < steps:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.side.name}: the run ended with {self.process.returncode}")
            if time.monotonic() > ends:
                break
            time.sleep(PERIOD_SECONDS)
        return count

    def cpu_seconds(self) -> float:
        """The CPU time of the run so far."""
        times = self.watched.cpu_times()
        return float(times.user + times.system)

    def turn(self, steps: int, neighbours: list[subprocess.Popen[bytes]], realtime: bool) -> dict[str, object]:
        """Let the run make `steps` steps; returns its tokens, seconds and CPU seconds from the end of one step to the
        end of a later step."""
        policy, priority = (os.SCHED_FIFO, 1) if realtime else (os.SCHED_OTHER, 0)
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            os.sched_setscheduler(int(task), policy, os.sched_param(priority))
        for process in [self.process, *neighbours]:
            process.send_signal(signal.SIGCONT)
        first = self.wait(len(self.tokens()) + 2, LONGEST_TURN)
        before = self._clocks(neighbours)
        last = self.wait(first + steps, LONGEST_TURN)
        after = self._clocks(neighbours)
        for process in [self.process, *neighbours]:
            process.send_signal(signal.SIGSTOP)
        seconds, cpu, others, main_cpu, main_waited, waited = (
            end - start for start, end in zip(before, after, strict=True)
        )
        return {
            "side": self.side.name,
            "neighbours": len(neighbours),
            "realtime": realtime,
            "steps": last - first,
            "tokens": sum(self.tokens()[first:last]),
            "seconds": round(seconds, 3),
            "cpu_seconds": round(cpu, 3),
            "others": round(others / max(seconds, 1e-9), 3),
            "main_cpu_seconds": round(main_cpu, 3),
            "main_waited_seconds": round(main_waited, 3),
            "waited_seconds": round(waited, 3),
        }

    def _clocks(self, neighbours: list[subprocess.Popen[bytes]]) -> tuple[float, ...]:
        """Seconds of: the clock; the run's CPU time; the CPU time of all other programs except the neighbours; CPU time
        and waiting time of the run's main thread; the waiting time of all its threads."""
        cpu, machine = self.cpu_seconds(), psutil.cpu_times()
        beside = [psutil.Process(each.pid).cpu_times() for each in neighbours]
        busy = machine.user + machine.nice + machine.system + machine.softirq + machine.irq
        others = busy - cpu - sum(times.user + times.system for times in beside)
        tasks = {int(task.name): _schedule(task) for task in Path(f"/proc/{self.process.pid}/task").iterdir()}
        return time.monotonic(), cpu, others, *tasks[self.process.pid], sum(waited for _, waited in tasks.values())


def _schedule(task: Path) -> tuple[float, float]:
    """Seconds that a thread ran, and seconds that it waited for a processor."""
    ran, waited, _ = (task / "schedstat").read_text(encoding="ascii").split()
    return int(ran) / 1e9, int(waited) / 1e9


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def measure(sides: list[Side], given: argparse.Namespace, values: dict[str, Any]) -> None:
    """Add rounds to the values, and write them after every turn."""
    rounds = values["turns"]
    with tempfile.TemporaryDirectory() as scratch:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            running = []
            for number, side in enumerate(sides):
                folder = given.before.resolve() if side.before else ROOT
                running.append(Running(side, folder, str(given.model.resolve()), Path(scratch) / str(number)))
                processes.append(running[-1].process)
            for each in running:
                each.wait(2, LONGEST_START)
                each.process.send_signal(signal.SIGSTOP)
            neighbours = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(max(given.neighbours))]
            processes += neighbours
            for process in neighbours:
                process.send_signal(signal.SIGSTOP)
            for turn in range(given.rounds):
                for count in given.neighbours:
                    for each in running[turn % len(running) :] + running[: turn % len(running)]:
                        rounds.append(each.turn(given.steps, neighbours[:count], given.realtime and not count))
                        print(json.dumps(rounds[-1]), flush=True)
                        rounds[-1]["nice"] = given.nice
                        write(values)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def write(values: dict[str, Any]) -> None:
    """Write the values, the median speeds, and the page."""
    values["speeds"] = {
        side.name: {
            count: statistics.median(map(_speed, turns)) for count in (0, 1) if (turns := _turns(values, side, count))
        }
        for side in SIDES
    }
    RESULTS.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(values), encoding="utf-8")


def page(values: dict[str, Any]) -> str:
    """The results in Markdown: medians over the counted turns, with their range."""
    counts = sorted({turn["neighbours"] for turn in values["turns"]})
    heads = [f"{_neighbours(count)}: {what}" for count in counts for what in ("tokens/s", "CPU seconds a step")]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'--:|' * len(heads)}"]
    for side in SIDES:
        turns = {count: _turns(values, side, count) for count in counts}
        if any(turns.values()):
            cells = (cell for count in counts for cell in _cells(turns[count]))
            lines.append(f"| {side.name} | {' | '.join(cells)} |")
    notes = PRIORITY if any(turn["nice"] < 0 for turn in values["turns"]) else ""
    return f"{INTRODUCTION}{notes}\n\n{values['machine']}\n\n" + "\n".join(lines) + "\n"


def _neighbours(count: int) -> str:
    return "idle" if not count else f"{count} busy {'neighbour' if count == 1 else 'neighbours'}"


def _turns(values: dict[str, Any], side: Side, neighbours: int) -> list[dict[str, Any]]:
    """The counted turns of a side."""
    of_side = [turn for turn in values["turns"] if (turn["side"], turn["neighbours"]) == (side.name, neighbours)]
    return [turn for turn in of_side if turn["others"] <= QUIET or turn["nice"] < 0]


def _speed(turn: dict[str, Any]) -> float:
    """Tokens per second."""
    return float(turn["tokens"] / turn["seconds"])


def _cells(turns: list[dict[str, Any]]) -> list[str]:
    """Median and range of tokens per second, and of CPU seconds per step."""
    if not all(turn["steps"] for turn in turns):
        return [f"no step in {min(turn['seconds'] for turn in turns if not turn['steps']):.0f} s", ""]
    if not turns:
        return ["", ""]
    speeds = sorted(map(_speed, turns))
    costs = sorted(turn["cpu_seconds"] / turn["steps"] for turn in turns)
    return [
        f"{statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})",
        f"{statistics.median(costs):.2f} ({costs[0]:.2f} to {costs[-1]:.2f})",
    ]


def main() -> None:
    """Measure, then write the page from all rounds so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="a checkout of the commit that is compared with")
    parser.add_argument("--sides", type=lambda text: text.split(";"), help="names, separated by ;")
    parser.add_argument("--neighbours", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument("--nice", type=int, default=0, help="of the session with the runs and the neighbours")
    parser.add_argument("--realtime", action="store_true", help="runs without neighbours have real-time priority")
    parser.add_argument("--again", action="store_true", help="without the rounds of before")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    if given.nice:
        if os.getsid(0) != os.getpid():
            os.setsid()  # the kernel schedules the programs of one session as a group
        Path("/proc/self/autogroup").write_text(str(given.nice), encoding="ascii")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the stopped runs are ended
    sides = [each for each in SIDES if each.name in (given.sides or [each.name for each in SIDES])]
    values: dict[str, Any] = {"turns": []}
    values |= json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() and not given.again else {}
    cores = f"{psutil.cpu_count()} processors, {_processor()}"
    values["machine"] = f"{cores}, torch {version('torch')}, {datetime.date.today()}."
    measure([each for each in sides if given.before or not each.before], given, values)
    write(values)


if __name__ == "__main__":
    main()
