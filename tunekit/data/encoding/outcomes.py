"""Encodes raw rows, in order: in this process, or in one process per core if the source is long."""

import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread

import torch

from tunekit.contracts import Row, RowKind
from tunekit.data.reading.first import MakeExample
from tunekit.data.reading.lines import RawRow
from tunekit.errors import DataError, ResourceError

LONG_ROWS = 8_000  # with more rows, several processes are faster although they take some seconds to start
CHUNK_ROWS = 500
MAX_PROCESSES = 61  # Windows cannot wait for more processes
FORKS = "forkserver" in get_all_start_methods()
MASKS_SIGNALS = hasattr(signal, "pthread_sigmask")


class Dropped(Exception):
    """The error for a row that is dropped from training, with the reason. Dropped rows are counted by reason."""


Outcome = tuple[int, list[Row] | Dropped | DataError]


@dataclass(frozen=True)
class SourceEncoder:
    """Encodes the raw rows of one source. `name`: the source's name, used in the rows' origins."""

    make_example: MakeExample
    kind: RowKind
    name: str

    def outcome(self, raw: RawRow) -> Outcome:
        """(line, encoded rows) of a raw row; (line, error) if it cannot be encoded or is dropped."""
        try:
            return raw.line, self._rows(raw)
        except (Dropped, DataError) as reason:
            return raw.line, reason

    def _rows(self, raw: RawRow) -> list[Row]:
        """The encoded rows of a raw row. `kind.notices` counts its parts that are dropped. Raises: Dropped if no part
        is left to train on; DataError for a wrong row."""
        rows, reasons = list[Row](), list[Dropped]()
        for example in self.kind.examples(self.make_example(raw.values)):
            try:
                rows.append(self.kind.encode(example, f"{self.name}:{raw.line}"))
            except Dropped as reason:
                reasons.append(reason)
        if reasons and not any(row.supervised for row in rows):
            raise reasons[0]
        self.kind.notices.update(f"parts of the rows left out: {reason}" for reason in reasons)
        return rows


def outcomes(rows: Iterator[RawRow], source: SourceEncoder) -> Iterator[Outcome]:
    """(line, encoded rows or error) of each row, in order. `source.kind.notices` is complete after the last row.

    Raises: ResourceError if an encoding process was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = list(islice(rows, LONG_ROWS))
    if len(first) < LONG_ROWS or cores == 1:
        yield from map(source.outcome, chain(first, rows))
        return
    arguments = (source.make_example, source.kind.counting(), source.name)
    context = get_context("forkserver" if FORKS else "spawn")
    if FORKS:  # the fork server imports this module once for all processes, before it has threads
        context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(cores, MAX_PROCESSES), mp_context=context, initializer=_begin, initargs=arguments)
    try:
        for found, notices in _in_order(pool, chain(first, rows), 2 * cores):
            source.kind.notices.update(notices)
            yield from found
    except BrokenProcessPool:
        what = "a process that encodes rows was killed"
        raise ResourceError(what, "provide more memory", file=source.name) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, rows: Iterable[RawRow], ahead: int
) -> Iterator[tuple[list[Outcome], Counter[str]]]:
    """Encoded chunks of rows with their notices, in order. `ahead`: how many chunks may wait in the pool."""
    pending: deque[Future[tuple[list[Outcome], Counter[str]]]] = deque()
    rest = iter(rows)
    for chunk in iter(lambda: list(islice(rest, CHUNK_ROWS)), []):
        with _interrupts_blocked():
            pending.append(pool.submit(_encode, chunk))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A block in which new processes start with SIGINT blocked: only the main process handles Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if MASKS_SIGNALS else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


_source: list[SourceEncoder] = []  # the encoder of a worker process


def _begin(make_example: MakeExample, kind: RowKind, name: str) -> None:
    if not MASKS_SIGNALS:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # for image processing in torch: there is already one process per core
    _source.append(SourceEncoder(make_example, kind, name))
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker process when its parent process ends for any reason."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode(chunk: list[RawRow]) -> tuple[list[Outcome], Counter[str]]:
    source = _source[0]
    source.kind.notices.clear()
    return list(map(source.outcome, chunk)), source.kind.notices
