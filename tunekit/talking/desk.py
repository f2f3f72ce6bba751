"""A queue of requests from many clients: one thread reads their prompts, and one answers them in order, those side by
side that can be."""

import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tunekit.errors import DataError
from tunekit.talking.conversation import Reply, Request, Speaker

WAITED_SECONDS = 0.005  # for more to come with the first one
MOST_JOBS = 192  # that have no answer yet


@dataclass
class Job:
    """A request of the adapter `name`. `on_text` is told of each piece, `on_end` of the reply or of what went wrong."""

    request: Request
    name: str
    on_text: Callable[[str], None]
    on_end: Callable[[Reply | Exception], None]
    seeded: bool = False  # whether its seed was asked for, so that it alone decides what is drawn
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be equal for two to be answered side by side; rows of a batch share what their seed draws."""
        return self.name, self.request.sampling, id(self) if self.seeded and self.request.sampling.temperature else 0


def going_down() -> ConnectionAbortedError:
    """What a job is told that gets no answer any more."""
    return ConnectionAbortedError("the server is going down")


class Desk:
    """Answers jobs until it is closed; those that wait then are told so."""

    def __init__(self, speaker: Speaker, most: int) -> None:
        self.speaker, self.most = speaker, most
        self._stopped = threading.Event()
        self._open: set[int] = set()  # ids of the jobs that were taken in and have not ended
        self._unread: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # their prompts are read
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._work)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> None:
        """Take a job in; one too many is told so."""
        if len(self._open) >= MOST_JOBS:
            job.on_end(ConnectionRefusedError(f"{MOST_JOBS} requests wait already; try again later"))
            return
        self._open.add(id(job))
        self._unread.put(job)

    def stop(self) -> None:
        """Give up the answers that are being made; whoever waits for one is told so."""
        self._stopped.set()

    def close(self) -> None:
        """End after the answers that are being made."""
        self._unread.put(None)
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        """Make the prompt of each job. A long one holds up those after it, but no answer that is being made."""
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
        job.on_end(going_down() if self._stopped.is_set() else reply)

    def _work(self) -> None:
        held: deque[Job] = deque()
        going = True
        while going or held:
            going = self._gather(held) and going
            if not going:
                for job in held:
                    self._end(job, going_down())
                return
            batch = [job for job in held if job.kind == held[0].kind][: self.most]
            held = deque(job for job in held if job not in batch)
            self._answer(list(filter(self._is_wanted, batch)))

    def _gather(self, held: deque[Job]) -> bool:
        """Everything that waits; where nothing is held yet, the next one is waited for. False: it was closed."""
        timeout = 0.0 if held else None
        while True:
            try:
                job = self._waiting.get(timeout != 0.0, timeout)
            except queue.Empty:
                return True
            if job is None:
                return False
            held.append(job)
            timeout = WAITED_SECONDS if len(held) == 1 else 0.0

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

        requests, sampling = [job.request for job in jobs], jobs[0].request.sampling
        if not jobs[0].seeded:
            drawn = replace(sampling, seed=secrets.randbits(62))
            requests = [replace(request, sampling=drawn) for request in requests]
        try:
            self.speaker.answer(requests, jobs[0].name, on_text, on_end)
        except Exception as error:
            alone = isinstance(error, DataError) and len(jobs) > 1  # of one of them: the others can be answered
            for row in sorted(unanswered):
                self._answer([jobs[row]]) if alone else on_end(row, error)

    def _is_wanted(self, job: Job) -> bool:
        """Whether somebody still waits for it, and will have an answer; if not, it ends."""
        if self._stopped.is_set() or job.cancelled.is_set():
            self._end(job, ConnectionAbortedError("the client is gone"))
            return False
        return True
