"""A queue of requests from many clients. One thread prepares requests (encodes prompts), a second thread answers them.
Several requests are answered at the same time."""

from __future__ import annotations

import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tunekit.errors import AdapterConflict
from tunekit.talking.answer import AnswerPiece, Reply, Request
from tunekit.talking.conversation import Answers, Speaker

MAX_JOBS = 192  # maximum number of unanswered requests


@dataclass(eq=False)
class Job:
    """A request to the adapter `name`. `on_piece` is called with each piece of text; `on_end` is called once, with the
    complete answer or with the error."""

    request: Request
    name: str
    on_piece: Callable[[AnswerPiece], None]
    on_end: Callable[[Reply | Exception], None]
    seeded: bool = False  # whether the client set the seed
    cancelled: threading.Event = field(default_factory=threading.Event)


def shutdown_error() -> ConnectionAbortedError:
    """The error for requests that have not been answered when the server shuts down."""
    return ConnectionAbortedError("the server is shutting down")


class Desk:
    """Answers the requests (jobs) of many clients until `close` is called. Jobs that are still waiting then get an
    error.

    Up to `slots` jobs are answered at the same time; prompt and answer of each have up to `tokens` tokens.
    """

    def __init__(self, speaker: Speaker, slots: int, tokens: int) -> None:
        self.speaker, self.slots, self.tokens, self.adapters = speaker, slots, tokens, speaker.adapters
        self._stopped = threading.Event()
        self._open: set[Job] = set()  # accepted jobs that have not ended
        self._unread: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # prepared
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._conflicts = False  # whether the first waiting job starts only after all running jobs have ended
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._read, self._work)]
        for thread in self._threads:
            thread.start()

    def put(self, jobs: Sequence[Job]) -> None:
        """Accept these jobs. If there would be more than MAX_JOBS unanswered jobs, all of these jobs get an error
        instead."""
        if len(self._open) + len(jobs) > MAX_JOBS:
            for job in jobs:
                job.on_end(ConnectionRefusedError(f"{MAX_JOBS} requests are waiting already; try again later"))
            return
        for job in jobs:
            self._open.add(job)
            self._unread.put(job)

    def stop(self) -> None:
        """Abort running answers. Their clients get an error."""
        self._stopped.set()

    def close(self) -> None:
        """Finish the running answers, then end both threads."""
        self._unread.put(None)
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        """The loop of the first thread, which prepares each job. A long prompt delays later jobs, but not the answers
        that are being generated."""
        while (job := self._unread.get()) is not None:
            if not self._is_wanted(job):
                continue
            try:
                request = self.speaker.prepare(job.request, job.name)
            except Exception as error:
                self._end(job, error)
                continue
            if not job.seeded:
                request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(62)))
            job.request = request
            self._arrived.put(job)
        self._arrived.put(None)

    def _work(self) -> None:
        """The loop of the second thread, which answers jobs. If an error occurs, such as a lack of memory, running jobs
        end with this error, and then waiting jobs start. If no job was running, waiting jobs end with the error too,
        and the loop starts again."""
        is_open = True
        while is_open:
            try:
                with self.speaker.answering(self.slots, self.tokens) as answers:
                    while is_open or self._running:
                        is_open = self._gather() and is_open
                        self._advance(answers, is_open)
            except Exception as error:
                if not self._running:
                    is_open = self._gather() and is_open
                    while self._waiting:
                        self._end(self._waiting.popleft(), error)
                for handle in list(self._running):
                    self._end(self._running.pop(handle), error)
        for job in self._waiting:
            self._end(job, shutdown_error())

    def _gather(self) -> bool:
        """Move jobs that have arrived to the waiting jobs. If there is nothing to do, wait for a job. Returns False if
        `close` was called."""
        while True:
            try:
                job = self._arrived.get(not (self._running or self._waiting))
            except queue.Empty:
                return True
            if job is None:
                return False
            self._waiting.append(job)

    def _advance(self, answers: Answers, is_open: bool) -> None:
        """Cancel answers whose clients have disconnected, start waiting jobs if possible, and generate one token of
        each answer."""
        for handle, job in list(self._running.items()):
            if not self._is_wanted(job):
                answers.cancel(handle)
                del self._running[handle]
        self._waiting = deque(filter(self._is_wanted, self._waiting))
        self._conflicts = self._conflicts and bool(self._running)
        while is_open and self._waiting and answers.free_slots and not self._conflicts:
            self._start(self._waiting.popleft(), answers)
        if self._running:
            answers.step()

    def _start(self, job: Job, answers: Answers) -> None:
        def on_piece(piece: AnswerPiece) -> bool:
            if piece.text or piece.scores:
                job.on_piece(piece)
            return True

        def on_end(reply: Reply) -> None:
            self._end(self._running.pop(handle), reply)

        try:
            handle = answers.put(job.request, job.name, on_piece, on_end)
        except Exception as error:
            self._conflicts = isinstance(error, AdapterConflict) and bool(self._running)
            if self._conflicts:
                self._waiting.appendleft(job)
            else:
                self._end(job, error)
        else:
            self._running[handle] = job

    def _end(self, job: Job, reply: Reply | Exception) -> None:
        self._open.discard(job)
        job.on_end(shutdown_error() if self._stopped.is_set() else reply)

    def _is_wanted(self, job: Job) -> bool:
        """Whether the client is still connected and the server is not shutting down. If not, the job ends."""
        if self._stopped.is_set() or job.cancelled.is_set():
            self._end(job, ConnectionAbortedError("the client has disconnected"))
            return False
        return True
