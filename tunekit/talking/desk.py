"""A queue of requests from many clients: one thread answers them in order, those side by side that can be."""

import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tunekit.errors import DataError
from tunekit.talking.conversation import Reply, Request, Speaker

WAITED_SECONDS = 0.005  # for more to come with the first one


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
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Take a job in."""
        self._waiting.put(job)

    def stop(self) -> None:
        """Give up the answers that are being made; whoever waits for one is told so."""
        self._stopped.set()

    def close(self) -> None:
        """End after the answers that are being made."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        held: deque[Job] = deque()
        going = True
        while going or held:
            going = self._gather(held) and going
            if not going:
                for job in held:
                    job.on_end(going_down())
                return
            batch = [job for job in held if job.kind == held[0].kind][: self.most]
            held = deque(job for job in held if job not in batch)
            self._answer(list(filter(self._readable, batch)))

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

        def on_text(row: int, text: str) -> bool:
            if text:
                jobs[row].on_text(text)
            return not (self._stopped.is_set() or jobs[row].cancelled.is_set())

        requests, sampling = [job.request for job in jobs], jobs[0].request.sampling
        if not jobs[0].seeded:
            drawn = replace(sampling, seed=secrets.randbits(62))
            requests = [replace(request, sampling=drawn) for request in requests]
        try:
            replies: Sequence[Reply | Exception] = self.speaker.answer(requests, jobs[0].name, on_text)
        except DataError as error:
            if len(jobs) > 1:  # of one of them: the others can be answered
                for job in jobs:
                    self._answer([job])
                return
            replies = [error]
        except Exception as error:
            replies = [error] * len(jobs)
        for job, reply in zip(jobs, replies, strict=True):
            job.on_end(going_down() if self._stopped.is_set() else reply)

    def _readable(self, job: Job) -> bool:
        """Whether it is still wanted and its conversation can be answered; if not, the job is told why."""
        try:
            if job.cancelled.is_set():
                raise ConnectionAbortedError("the client is gone")
            self.speaker.prompt_ids(job.request.messages)
        except Exception as error:
            job.on_end(error)
            return False
        return True
