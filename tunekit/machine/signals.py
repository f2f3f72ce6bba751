"""Stop signals: the first asks the run to save and stop, or ends what has nothing to save; the second ends it at once.
And the alarm that ends foreign code which takes too long.

Comes in: SIGINT, SIGTERM, SIGHUP or SIGBREAK.  Goes out: `requested`, which every loop looks at.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from tunekit.errors import Stopped

AGAIN_SECONDS = 1.0  # between the alarms for a block that caught one
STOP_SIGNALS = tuple(  # SIGHUP is of POSIX, SIGBREAK (Ctrl-Break, a closed window) of Windows
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)


class _StopNow(KeyboardInterrupt):
    """Raised wherever the process is; no KeyboardInterrupt is caught by what catches every Exception."""


class TimeUp(BaseException):
    """A block took longer than it may; no Exception, so that foreign code which catches those does not catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A block that is ended after so long; it takes its time outside the main thread, and where there is no alarm.

    A bare `except:` in it catches the alarm: it rings again, for every part of the block that goes on, and what such a
    block returns does not count.
    Raises: TimeUp.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    rang = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rang
        rang = True
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, AGAIN_SECONDS))
    try:
        yield
    except Exception:
        if not rang:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    if rang:
        raise TimeUp


class StopSignals:
    """While entered, the stop signals set `requested` to their number; a second one exits with 128 + its number.

    Outside the main thread nothing is installed, and `requested` stays None. A hang-up that was ignored before (nohup)
    stays ignored.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self.requested: int | None = None
        self._announce = announce
        self._critical = 0
        self._at_once = False
        self._exit_code: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in STOP_SIGNALS:
            before = signal.getsignal(number)
            if number.name == "SIGHUP" and before is signal.SIG_IGN:
                continue
            self._before[number] = before
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
            if self._at_once and not self._critical:
                raise _StopNow
            if not self._at_once:
                self._tell(f"\n{signal.Signals(number).name}: saving and stopping; once more ends at once\n")
        elif self._critical:
            self._exit_code = 128 + number
        else:
            os._exit(128 + number)

    def _tell(self, text: str) -> None:
        """Straight to the file descriptor: Python's streams may not be entered twice from a signal."""
        if self._announce:
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    @contextlib.contextmanager
    def at_once(self, what: str) -> Iterator[None]:
        """Inside, where nothing is there to save yet, the first signal ends the block. Raises: Stopped."""
        self._at_once = self.requested is None
        with contextlib.suppress(_StopNow):
            try:
                yield
            finally:
                self._at_once = False
        if self.requested is not None:
            raise Stopped(f"stopped by {signal.Signals(self.requested).name} {what}", self.requested)

    @contextlib.contextmanager
    def critical(self) -> Iterator[None]:
        """Inside, no signal ends the process; one that would have does so at the end of the block."""
        self._critical += 1
        try:
            yield
        finally:
            self._critical -= 1
            if not self._critical and self._exit_code is not None:
                os._exit(self._exit_code)
