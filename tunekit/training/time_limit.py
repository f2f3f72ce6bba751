"""The time limit training.max_minutes: when a run must end, so that it still has time for its last evaluation, its
export and its report."""

import math
import time
from collections import deque
from dataclasses import dataclass, field

from tunekit.data.rows import RowSet
from tunekit.errors import Problem
from tunekit.machine.cpu_times import process_seconds
from tunekit.recipe.recipe import Recipe
from tunekit.training.state import LoopState

DISK_BYTES = 100e6  # bytes written per second, until a checkpoint of the run is measured
CHECKPOINT_BYTES = 12  # of each trained number: float32 weights and two moments
REPORT_SECONDS = 1.0  # to write the report and to end the process
PACES = 8  # the last times between two possible stops, of which the longest counts
KEY = "training.max_minutes"


def process_start() -> float:
    """When this process was started, as a time of time.monotonic."""
    return time.monotonic() - process_seconds()


@dataclass(frozen=True)
class RunEnd:
    """Facts about a run from which the time of its end is estimated, as far as it was not measured.

    `numbers`: of trained numbers. `evaluation_tokens`: of all evaluation rows. `reads_best`: a checkpoint may be read.
    `stop_steps`: the steps up to the next possible stop; `micro_batches`: of a step. `eval_steps`, `save_steps`: as in
    the recipe.
    """

    numbers: int = 0
    evaluation_tokens: int = 0
    reads_best: bool = False
    stop_steps: int = 1
    micro_batches: int = 1
    eval_steps: int = 100
    save_steps: int = 100

    def first_seconds(self, state: LoopState) -> float:
        """The seconds up to the next possible stop, from earlier steps, or from the longest micro-batch if it was tried
        before step 1."""
        tried = state.seconds.get("try", 0.0) * self.micro_batches
        return self.stop_steps * (state.seconds.get("train", 0.0) / state.step if state.step else tried)

    def seconds(self, state: LoopState) -> float:
        """The seconds of a checkpoint, the last evaluation, the export (not larger than a checkpoint), the tasks and
        the report; also of the evaluations and checkpoints before the next possible stop."""
        save = state.longest.get("save", self.numbers * CHECKPOINT_BYTES / DISK_BYTES)
        per_token = state.seconds.get("train", 0.0) / max(state.tokens, 1)  # with a backward pass, so not too short
        evaluation = (
            state.longest.get("evaluate", per_token * self.evaluation_tokens) if self.evaluation_tokens else 0.0
        )
        export = state.longest.get("export", save * (1 + self.reads_best))
        evaluations = self._due(state, self.eval_steps)
        saves = self._due(state, self.save_steps) + evaluations * self.reads_best
        seconds = save * (1 + saves) + evaluation * (1 + evaluations)
        return seconds + export + state.longest.get("tasks", 0.0) + REPORT_SECONDS

    def _due(self, state: LoopState, multiple: int) -> int:
        """How many multiples of `multiple` are between the present step and the next possible stop."""
        return (state.step + self.stop_steps - 1) // multiple - state.step // multiple


def run_end(recipe: Recipe, rows: RowSet, numbers: int) -> RunEnd:
    """The facts about a run with this number of trained numbers."""
    training, tokens = recipe.training, 0 if rows.evaluation is None else int(rows.evaluation.lengths.sum())
    steps = rows.objective.loss.updates_per_sampling, training.gradient_accumulation_steps
    return RunEnd(numbers, tokens, recipe.evaluation.best is not None, *steps, training.eval_steps, training.save_steps)


@dataclass
class TimeLimit:
    """The time of one start of a run. `seconds`: None without a limit. `started`: a time of time.monotonic.
    `ends_at`: the run ends after this step as if its time was up, because an audit repeats it. `earlier`: seconds
    before `started` in which this start already trained the run, a trial that then paused. `others`: seconds in which
    the other trials that train together with this one may end."""

    seconds: float | None = None
    started: float = field(default_factory=process_start)
    ends_at: int | None = None
    earlier: float = 0.0
    others: float = 0.0
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=PACES))
    marked: float | None = None  # when the run could stop last

    @property
    def is_set(self) -> bool:
        """Whether the run can end by time."""
        return self.seconds is not None or self.ends_at is not None

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.earlier + time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds for work before the report; None without a limit."""
        return None if self.seconds is None else max(self.seconds - self.elapsed - REPORT_SECONDS, 0.001)

    @property
    def has_trained(self) -> bool:
        """Whether this start has trained, at least a part of a step."""
        return self.marked is not None

    def begin(self, state: LoopState) -> None:
        """Note when the first step begins."""
        if self.marked is None:
            self.marked = _stepping(state)

    def mark(self, state: LoopState) -> None:
        """Note that the run can stop now."""
        now = _stepping(state)
        self.paces.append(now - (self.marked or 0.0))
        self.marked = now

    def is_over(self, state: LoopState, ending: RunEnd) -> bool:
        """Whether the time left is too short for the steps up to the next possible stop and for the end of the run."""
        if self.ends_at is not None:
            return state.step == self.ends_at
        needed = max(self.paces) + ending.seconds(state) + self.others
        return self.seconds is not None and self.elapsed + needed > self.seconds

    def lack(self, state: LoopState, ending: RunEnd) -> Problem | None:
        """The problem of a limit that leaves no time for a step."""
        first, end = ending.first_seconds(state), ending.seconds(state)
        needed = self.elapsed + first + end
        if self.seconds is None or needed <= self.seconds:
            return None
        limit = f"a limit of {self.seconds / 60:g} min leaves no time for a step: {self.elapsed:.0f} s have passed"
        what = (
            f"{limit}, a step takes about {first:.1f} s, and the last evaluation, the export and the report {end:.1f} s"
        )
        return Problem(what, f"write at least {math.ceil(needed / 6) / 10:g}", key=KEY)


def _stepping(state: LoopState) -> float:
    """A clock for steps, which stands still in evaluations and saves."""
    return time.monotonic() - state.seconds.get("evaluate", 0.0) - state.seconds.get("save", 0.0)
