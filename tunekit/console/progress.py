"""Shows the progress of training and evaluation: one live line on a terminal, otherwise plain lines at intervals."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count

from tunekit.console import Console
from tunekit.console.loudness import is_quiet
from tunekit.console.streams import can_encode
from tunekit.console.text import BARS, curve_text, time_text
from tunekit.records import DEFAULT_SHOWS, EvaluationRecord, Shows, StepRecord, bytes_text

LIVE_SECONDS = 0.1  # minimum between two updates of the live line
PLAIN_SECONDS = 10.0  # minimum between two plain lines
BEAT_SECONDS = 1.0  # between two updates of the live line during the first step
PLAIN_SHARE = 0.02  # minimum wait as a share of the elapsed time, so that a long run writes few lines
RATE_STEPS = 30  # number of last steps from whose durations the time left is computed
CURVE_STEPS, CURVE_COLUMNS = 500, 12
BAR_COLUMNS, FULL, EMPTY = 12, "█", "░"


class Heartbeat:
    """Shows how long a step has been running. A separate thread shows this, because the main thread computes the
    step."""

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what = console, what
        self._began, self._ended = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        for wait in beat_waits(self._console.is_terminal):
            if self._ended.wait(wait):
                return
            self._console.draw(f"{self._what}, {time_text(time.monotonic() - self._began)} so far")

    def stop(self) -> None:
        """Stop to show the time, and wait until the thread has ended."""
        self._ended.set()
        self._thread.join()


def beat_waits(live: bool) -> Iterator[float]:
    """Yields the seconds to wait before the time is shown again. On a terminal, it is shown at once and then at equal
    intervals. Otherwise, the intervals between lines double."""
    yield 0.0 if live else PLAIN_SECONDS
    for turn in count():
        yield BEAT_SECONDS if live else PLAIN_SECONDS * 2**turn


class StepProgress:
    """Reports steps and evaluations: a live line on a terminal, otherwise plain lines. The first and the last step are
    always reported."""

    def __init__(
        self,
        console: Console,
        total_steps: int,
        clock: Callable[[], float] = time.monotonic,
        budget_bytes: int | None = None,
        shows: Shows = DEFAULT_SHOWS,
    ) -> None:
        self._console = console
        self._total, self._budget_bytes, self._headline = total_steps, budget_bytes, shows.headline.name
        self._speed_unit = "tok" if shows.sizes == "tokens" else shows.sizes
        self._curve: deque[float] = deque(maxlen=CURVE_STEPS)
        self._clock = clock
        self._began = clock()
        self._reported_at = float("-inf")
        self._last: StepRecord | None = None
        self._reported: StepRecord | None = None
        self._pace: deque[float] = deque(maxlen=RATE_STEPS)  # seconds of the last steps
        self._stopped = False
        self._heartbeat: Heartbeat | None = None
        self._is_live = console.is_terminal

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_heartbeat()
        if self._last is not None and (self._is_live or self._last is not self._reported):
            self._console.draw(self.line(self._last), stays=True)

    def start(self, step: int) -> None:
        """Show that the first step of this process is being computed, which can take minutes. The next call of `update`
        ends this."""
        if self._console.enabled and not is_quiet():
            self._heartbeat = Heartbeat(self._console, f"step {step}/{self._total}  computing")

    def _end_heartbeat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None

    def update(self, record: StepRecord) -> None:
        """Report a finished optimizer step."""
        self._end_heartbeat()
        now = self._clock()
        self._last = record
        self._curve.append(self._headline_value(record)[1])
        self._pace.append(record.seconds)
        last = record.step >= self._total
        wait = LIVE_SECONDS if self._is_live else max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._began))
        if not last and now - self._reported_at < wait:
            return
        self._reported_at, self._reported = now, record
        self._console.draw(self.line(record))

    def stop(self) -> None:
        """Mark the run as ended, so that later lines show no remaining time."""
        self._stopped = True

    def evaluation(self, record: EvaluationRecord) -> None:
        """Report an evaluation. Its line stays on the screen."""
        metrics = sorted(record.metrics.items())  # a correlation with a constant is not defined: NaN
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics if name == "loss" or not math.isnan(value))
        self._console.info(f"step {record.step}  eval  {values}")

    def _headline_value(self, record: StepRecord) -> tuple[str, float]:
        """Name and value of the objective's most important metric. If the step did not log it, the loss."""
        name = self._headline if self._headline in record.metrics else "loss"
        return name, record.metrics.get(name, record.loss)

    def line(self, record: StepRecord) -> str:
        """step 12/100  loss 1.2345  lr 2.00e-04  1,234 tok/s  peak 1.5 GiB  3m20s left.

        If the objective has a metric that is more important than the loss, this metric is shown instead.
        A terminal also shows a bar of the steps and a curve of recent losses. On a narrow terminal, parts are dropped
        in this order: curve, bar, learning rate, memory, speed, loss. The step and the remaining time always stay.
        """
        left, draws = self.seconds_left(), self._is_live and can_encode(self._console.output, BARS + FULL + EMPTY)
        done = round(BAR_COLUMNS * min(record.step / max(self._total, 1), 1.0))
        budget = "" if self._budget_bytes is None else f" of {bytes_text(self._budget_bytes)}"
        name, value = self._headline_value(record)
        parts = {
            "step": f"step {record.step}/{self._total}",
            "bar": FULL * done + EMPTY * (BAR_COLUMNS - done) if draws else "",
            "headline": f"{name} {value:.4f}",
            "curve": curve_text(list(self._curve), CURVE_COLUMNS) if draws else "",
            "rate": f"lr {record.learning_rate:.2e}",
            "speed": f"{record.tokens_per_second:,.0f} {self._speed_unit}/s",
            "memory": f"peak {bytes_text(record.peak_bytes)}{budget}",
            "left": "" if left is None else f"{time_text(left)} left",
        }
        for name in ("", "curve", "bar", "rate", "memory", "speed", "headline"):
            parts.pop(name, None)
            text = "  ".join(part for part in parts.values() if part)
            if not self._is_live or len(text) < self._console.columns:
                break
        return text

    def seconds_left(self) -> float | None:
        """The time for `steps` more steps, estimated from the recorded `seconds` of the last steps; None if unknown.

        No clock is used, because `tunekit watch` may read the records of an hour of training within a second.
        """
        return None if self._last is None or self._stopped else seconds_left(self._pace, self._total - self._last.step)


def seconds_left(seconds: Iterable[float], steps: int) -> float | None:
    """Time for `steps` more steps, estimated from the recorded `seconds` of the last steps; None if unknown.

    Recorded times are used instead of a clock, because `tunekit watch` may read an hour of training within a second.
    """
    pace = list(seconds)[-RATE_STEPS:]
    return steps * sum(pace) / len(pace) if pace and steps > 0 else None


class CountProgress:
    """Reports that N of M items are done: a live line on a terminal, otherwise a plain line at intervals."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._wait = LIVE_SECONDS if console.is_terminal else PLAIN_SECONDS
        self._reported_at, self._drawn = clock(), False

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` items are done, such as ("rows measured", 120, 427).

        The last item is reported only if some progress was reported before.
        """
        now, ends = self._clock(), self._drawn and done == total
        if now - self._reported_at < self._wait and not ends:
            return
        self._reported_at, self._drawn = now, done < total
        self._console.draw(f"{what}: {done:,} of {total:,}")
