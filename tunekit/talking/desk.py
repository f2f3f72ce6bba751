"""A queue of requests from many clients. One thread renders their prompts, and one answers them in order, in batches
if possible."""

import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tunekit.errors import DataError
from tunekit.talking.conversation import Reply, Request, Speaker

GATHER_SECONDS = 0.005  # time to wait for more requests after the first request
MAX_JOBS = 192  # maximum number of unanswered requests


@dataclass
class Job:
    """A request for the adapter `name`. `on_text` receives each piece of text, `on_end` the reply or the error."""

    request: Request
    name: str
    on_text: Callable[[str], None]
    on_end: Callable[[Reply | Exception], None]
    seeded: bool = False  # whether the client set the seed
    cancelled: threading.Event = field(default_factory=threading.Event)


def shutdown_error() -> ConnectionAbortedError:
    """The error sent to requests that are still waiting at shutdown."""
    return ConnectionAbortedError("the server is shutting down")


class Desk:
    """Answers jobs until the desk is closed. Jobs that are still waiting then get an error."""

    def __init__(self, speaker: Speaker, batch_size: int) -> None:
        self.speaker, self.batch_size = speaker, batch_size
        self._stopped = threading.Event()
        self._open: set[int] = set()  # ids of accepted jobs that have not ended
        self._unread: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # their prompts are rendered
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._read, self._work)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> None:
        """Accept a job, or answer it with an error if MAX_JOBS jobs are open."""
        if len(self._open) >= MAX_JOBS:
            job.on_end(ConnectionRefusedError(f"{MAX_JOBS} requests are waiting already; try again later"))
            return
        self._open.add(id(job))
        self._unread.put(job)

    def stop(self) -> None:
        """Abort running answers; their clients get an error."""
        self._stopped.set()

    def close(self) -> None:
        """Finish the running answers, then end both threads."""
        self._unread.put(None)
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        """Render the prompt of each job. A long one delays later jobs, but no running answer."""
        while (job := self._unread.get()) is not None:
            if not self._is_wanted(job):
                continue
            try:
                prompt = self.speaker.prompt_ids(job.request.messages)
            except Exception as error:
                self._end(job, error)
                continue
            job.request = replace(job.request, messages=(), prompt=prompt)
            self._waiting.put(job)
        self._waiting.put(None)

    def _end(self, job: Job, reply: Reply | Exception) -> None:
        self._open.discard(id(job))
        job.on_end(shutdown_error() if self._stopped.is_set() else reply)

    def _work(self) -> None:
        jobs: deque[Job] = deque()
        is_open = True
        while is_open or jobs:
            is_open = self._gather(jobs) and is_open
            if not is_open:
                for job in jobs:
                    self._end(job, shutdown_error())
                return
            batch = [job for job in jobs if job.name == jobs[0].name][: self.batch_size]
            jobs = deque(job for job in jobs if job not in batch)
            self._answer(list(filter(self._is_wanted, batch)))

    def _gather(self, jobs: deque[Job]) -> bool:
        """Collect all waiting jobs in `jobs`; if no job is waiting, wait for the next one. Returns False if the desk
        was closed."""
        timeout = 0.0 if jobs else None
        while True:
            try:
                job = self._waiting.get(timeout != 0.0, timeout)
            except queue.Empty:
                return True
            if job is None:
                return False
            jobs.append(job)
            timeout = GATHER_SECONDS if len(jobs) == 1 else 0.0

    def _answer(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        unanswered = set(range(len(jobs)))

        def on_text(row: int, text: str) -> bool:
            if text:
                jobs[row].on_text(text)
            return not (self._stopped.is_set() or jobs[row].cancelled.is_set())

        def on_end(row: int, reply: Reply | Exception) -> None:
            unanswered.discard(row)
            self._end(jobs[row], reply)

        requests = [
            job.request
            if job.seeded
            else replace(job.request, sampling=replace(job.request.sampling, seed=secrets.randbits(62)))
            for job in jobs
        ]
        try:
            self.speaker.answer(requests, jobs[0].name, on_text, on_end)
        except Exception as error:
            alone = isinstance(error, DataError) and len(jobs) > 1  # the error may concern one job: answer the others
            for row in sorted(unanswered):
                self._answer([jobs[row]]) if alone else on_end(row, error)

    def _is_wanted(self, job: Job) -> bool:
        """Whether the client still waits and the server still answers; if not, the job ends."""
        if self._stopped.is_set() or job.cancelled.is_set():
            self._end(job, ConnectionAbortedError("the client has disconnected"))
            return False
        return True
