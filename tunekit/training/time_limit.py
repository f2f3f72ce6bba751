"""The time limit training.max_minutes: when a run must end, so that it still has time for its last evaluation, its
export and its report."""

import math
import time
from collections import deque
from dataclasses import dataclass, field

from tunekit.errors import Problem
from tunekit.machine.cpu_times import process_seconds
from tunekit.training.state import LoopState

DISK_BYTES = 100e6  # bytes written per second, until a checkpoint of the run is measured
CHECKPOINT_BYTES = 12  # of each trained number: float32 weights and two moments
REPORT_SECONDS = 1.0  # to write the report and to end the process
PACES = 8  # the last times between two possible stops, of which the longest counts
KEY = "training.max_minutes"


def process_start() -> float:
    """When this process was started, as a time of time.monotonic."""
    return time.monotonic() - process_seconds()


@dataclass
class TimeLimit:
    """The time of one start of a run. `seconds`: None without a limit. `started`: a time of time.monotonic.
    `ends_at`: the run ends after this step as if its time was up, because an audit repeats it."""

    seconds: float | None = None
    started: float = field(default_factory=process_start)
    ends_at: int | None = None
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=PACES))
    marked: float = 0.0

    @property
    def is_set(self) -> bool:
        """Whether the run can end by time."""
        return self.seconds is not None or self.ends_at is not None

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds for work before the report; None without a limit."""
        return None if self.seconds is None else max(self.seconds - self.elapsed - REPORT_SECONDS, 0.001)

    def mark(self, other_seconds: float, *, first: bool = False) -> None:
        """Note that the run can stop now. `other_seconds`: of all evaluations and saves, which the pace of steps does
        not include. `first`: before the first step."""
        now = time.monotonic() - other_seconds
        if not first:
            self.paces.append(now - self.marked)
        self.marked = now

    def is_over(self, step: int, end_seconds: float) -> bool:
        """Whether the time left is too short for the steps up to the next possible stop and for the end of the run."""
        if self.ends_at is not None:
            return step == self.ends_at
        return self.seconds is not None and self.elapsed + max(self.paces) + end_seconds > self.seconds

    def lack(self, first_seconds: float, end_seconds: float) -> Problem | None:
        """The problem of a limit that leaves no time for a step. `first_seconds`: of the steps up to the next possible
        stop."""
        needed = self.elapsed + first_seconds + end_seconds
        if self.seconds is None or needed <= self.seconds:
            return None
        what = (
            f"{self.seconds / 60:g} minutes leave no time for a step: {self.elapsed:.0f} s have passed, a step takes "
        )
        what += f"about {first_seconds:.1f} s, and the last evaluation, the export and the report {end_seconds:.1f} s"
        return Problem(what, f"write at least {math.ceil(needed / 6) / 10:g}", key=KEY)


def end_seconds(state: LoopState, numbers: int, evaluation_tokens: int, *, reads_best: bool) -> float:
    """The estimated seconds of a run's end: a checkpoint, the last evaluation, the export (not larger than a
    checkpoint), the tasks and the report. What was not measured in this run is estimated.

    `numbers`: of trained numbers; `evaluation_tokens`: of all evaluation rows; `reads_best`: a checkpoint may be read.
    """
    save = state.longest.get("save", numbers * CHECKPOINT_BYTES / DISK_BYTES)
    per_token = state.seconds.get("train", 0.0) / max(state.tokens, 1)  # with a backward pass, so it is not too short
    evaluation = state.longest.get("evaluate", per_token * evaluation_tokens) if evaluation_tokens else 0.0
    export = state.longest.get("export", save * (1 + reads_best))
    return save + evaluation + export + state.longest.get("tasks", 0.0) + REPORT_SECONDS
