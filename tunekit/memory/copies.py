"""Copies between the host and the device that run in parallel with the computation, in a defined order."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from tunekit.errors import ResourceError, is_out_of_memory
from tunekit.memory.blobs import forget_pages
from tunekit.records import bytes_text

Mark = torch.Event | None  # a position in the queue of computations; None if the device has already passed it
# In progress (a list: between ranks), or finished.
Copy: TypeAlias = "Future[None] | Future[torch.Event] | list[torch.distributed.Work] | Mark"
Pairs = Sequence[tuple[Tensor, Tensor]]  # target and source
RING_BYTES = 64 * 2**20  # pinned memory that mapped files pass through on their way to a GPU
RING_PARTS = 2


class Copier:
    """Allocates memory on the host and the device, and copies between them. This base class copies synchronously; on
    the meta device it copies nothing.

    Copies are made in the order of the calls of `start`.
    `mapped`: memory addresses of sources in mapped files; their pages are released after the copy.
    `counts_host`: False if the host memory of a simulated GPU is not counted.
    """

    def __init__(self, device: torch.device, mapped: frozenset[int] = frozenset(), *, counts_host: bool = True) -> None:
        self.device, self.mapped, self.counts_host = device, mapped, counts_host

    def memory(self, size_bytes: int, *, on_host: bool) -> Tensor:
        """Allocate memory (size_bytes,) uint8, on the host or on the device."""
        counted = self.counts_host or not on_host
        return torch.empty(size_bytes if counted else 0, dtype=torch.uint8, device=self.device)

    def start(self, copies: Pairs, after: Mark) -> Copy:
        """Start copies as soon as the device has finished the computations before the mark `after`. Pass the result to
        `wait`."""
        for target, source in copies:
            if not target.is_meta:
                target.copy_(source)
                if source.data_ptr() in self.mapped:
                    forget_pages(source)
        return None

    def wait(self, copy: Copy) -> None:
        """Make all later computations wait for the copy."""

    def mark(self) -> Mark:
        """A mark behind all computations that have been queued so far. On a CPU these have already finished."""
        return None

    def finish(self, mark: Mark) -> None:
        """Make the host wait until the device has finished all computations before the mark."""


class ThreadCopier(Copier):
    """On a CPU: one thread copies while the main thread computes."""

    def __init__(self, device: torch.device, mapped: frozenset[int] = frozenset()) -> None:
        super().__init__(device, mapped)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tunekit-copy")

    def start(self, copies: Pairs, after: Mark) -> Copy:
        return self._worker.submit(self._copy, copies)

    def wait(self, copy: Copy) -> None:
        if isinstance(copy, Future):
            copy.result()

    def _copy(self, copies: Pairs) -> None:
        for target, source in copies:
            copy_bytes(target, source)
            if source.data_ptr() in self.mapped:
                forget_pages(source)


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy with one thread, and without Python's lock. torch's own copy would take the threads of the computation."""
    as_bytes(target).numpy()[...] = as_bytes(source).numpy()


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as (bytes,) uint8."""
    return tensor.detach().reshape(-1).view(torch.uint8)


class StreamCopier(ThreadCopier):
    """On a GPU: copies on a separate stream, ordered by events. The host never waits.

    A source on the device or in pinned memory is copied directly. A source in a mapped file is first copied to pinned
    memory by a thread, because a copy from pageable memory would wait for the device. This pinned memory is a ring of
    two parts.
    """

    def __init__(self, device: torch.device, mapped: frozenset[int] = frozenset()) -> None:
        super().__init__(device, mapped)
        self.stream = torch.Stream(device)
        self._ring: list[Tensor] = []
        self._free: list[Mark] = [None] * RING_PARTS  # the event after which this part of the ring may be overwritten
        self._next = 0

    def memory(self, size_bytes: int, *, on_host: bool) -> Tensor:
        """As Copier. Raises: ResourceError if the host has too little memory to pin."""
        try:
            if on_host:
                return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):  # torch reports the GPU's memory here
                raise
            what = f"{bytes_text(size_bytes)} of the host's memory cannot be pinned for copies to the GPU"
            raise ResourceError(what, "free host memory, or set memory.streaming to disk or off") from error
        return super().memory(size_bytes, on_host=False)

    def start(self, copies: Pairs, after: Mark) -> Copy:
        if all(source.device.type != "cpu" or source.is_pinned() for _, source in copies):
            return self._send(copies, after)
        return self._worker.submit(self._send, copies, after, through_ring=True)

    def wait(self, copy: Copy) -> None:
        event = copy.result() if isinstance(copy, Future) else copy
        if isinstance(event, torch.Event):
            torch.accelerator.current_stream(self.device).wait_event(event)

    def mark(self) -> Mark:
        return torch.accelerator.current_stream(self.device).record_event()

    def finish(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    def _send(self, copies: Pairs, after: Mark, through_ring: bool = False) -> torch.Event:
        with self.stream:
            if after is not None:
                self.stream.wait_event(after)
            for target, source in copies:
                # keep the allocator from reusing its memory before the copy has finished
                if target.device.type != "cpu":
                    target.record_stream(self.stream)
                if not through_ring:
                    target.copy_(source, non_blocking=True)
                    continue
                wide, narrow = as_bytes(target), as_bytes(source)
                for start in range(0, narrow.numel(), RING_BYTES):
                    self._pass_on(wide[start : start + RING_BYTES], narrow[start : start + RING_BYTES])
                if source.data_ptr() in self.mapped:
                    forget_pages(source)
            return self.stream.record_event()

    def _pass_on(self, target: Tensor, source: Tensor) -> None:
        """Copy `source` into the next part of the pinned ring, and send this part to the device."""
        if not self._ring:
            self._ring = [self.memory(RING_BYTES, on_host=True) for _ in range(RING_PARTS)]
        part = self._next
        self._next = (part + 1) % RING_PARTS
        self.finish(self._free[part])
        pinned = self._ring[part][: source.numel()]
        copy_bytes(pinned, source)
        target.copy_(pinned, non_blocking=True)
        self._free[part] = self.stream.record_event()
