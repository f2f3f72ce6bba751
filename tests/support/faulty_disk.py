"""A disk that fails or kills at one chosen event, put in place of artifacts.durable.perform."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunekit.files import durable

KILLED = 77  # exit status of a child that died at the chosen event


class FaultyDisk:
    """Counts events; at number `at` (from 0) kills, tears or fails. `events` lists (kind, path)."""

    def __init__(self, at: int | None = None, mode: str = "count", number: int = errno.ENOSPC, forever: bool = False):
        self.at, self.mode, self.number, self.forever = at, mode, number, forever
        self.events: list[tuple[str, Path]] = []

    def perform(self, kind: str, path: Path, action: Callable[[], Any]) -> Any:
        index = len(self.events)
        self.events.append((kind, path))
        due = self.at is not None and (index == self.at or (self.forever and index > self.at))
        if due and self.mode == "fail":
            raise OSError(self.number, os.strerror(self.number), str(path))
        if due and self.mode == "kill":
            os._exit(KILLED)
        result = action()
        if due and self.mode == "tear":  # a write of which half arrived
            if kind == "write":
                os.truncate(path, os.path.getsize(path) // 2)
            os._exit(KILLED)
        return result


def in_child(work: Callable[[], None], disk: FaultyDisk) -> int:
    """Run `work` on `disk` in a forked child; its exit status: 0, KILLED, or 1 after any exception."""
    child = os.fork()
    if child == 0:
        try:
            durable.perform = disk.perform
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_events(work: Callable[[], None]) -> list[tuple[str, Path]]:
    """What `work` does to a sound disk."""
    disk = FaultyDisk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "perform", disk.perform)
        work()
    return disk.events
