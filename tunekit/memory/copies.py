"""Copies between the host and the device of a computation, ordered against what is computed."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from tunekit.memory.blobs import forget_pages

Mark = torch.Event | None  # how far a computation had been sent off; None: it has ended
Copy = Future[None] | Future[torch.Event] | Mark  # on its way, or made
Pairs = Sequence[tuple[Tensor, Tensor]]  # target and source
RING_BYTES = 64 * 2**20  # of pinned memory through which a mapped file passes on its way to a GPU
RING_PARTS = 2


class Copier:
    """Memory on both sides, and copies between them, here made at once; on the meta device nothing is copied.

    Copies of one copier are made in the order in which they were asked for.
    `mapped`: addresses of sources that are pages of files, which leave this process's memory once they are copied.
    `counts_host`: False where a simulated GPU's host is no part of the memory that is counted.
    """

    def __init__(self, device: torch.device, mapped: frozenset[int] = frozenset(), *, counts_host: bool = True) -> None:
        self.device, self.mapped, self.counts_host = device, mapped, counts_host

    def memory(self, size_bytes: int, *, on_host: bool) -> Tensor:
        """(size_bytes,) uint8 on the host, or where the computation is."""
        counted = self.counts_host or not on_host
        return torch.empty(size_bytes if counted else 0, dtype=torch.uint8, device=self.device)

    def start(self, copies: Pairs, after: Mark) -> Copy:
        """Begin copies, once the computation has passed the mark `after`; returns what `wait` takes."""
        for target, source in copies:
            if not target.is_meta:
                target.copy_(source)
                if source.data_ptr() in self.mapped:
                    forget_pages(source)
        return None

    def wait(self, copy: Copy) -> None:
        """Let nothing that is computed from here on begin before the copy has ended."""

    def mark(self) -> Mark:
        """The computation as far as it has been sent off; what is computed on a CPU has ended when its call returns."""
        return None

    def finish(self, mark: Mark) -> None:
        """Wait on the host until the computation has passed the mark."""


class ThreadCopier(Copier):
    """On a CPU: one thread copies beside the computation."""

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
    """One thread, without Python's lock, whatever torch's number of threads is: torch's own copy would take them all
    from the computation."""
    as_bytes(target).numpy()[...] = as_bytes(source).numpy()


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory, (bytes,) uint8."""
    return tensor.detach().reshape(-1).view(torch.uint8)


class StreamCopier(ThreadCopier):
    """On a GPU: copies on a stream of their own, ordered by events; nothing waits on the host.

    What lies on the device or in pinned memory is copied straight away. A source in a mapped file passes through a ring
    of pinned memory, filled by the thread: a copy from pageable memory would wait for the device.
    """

    def __init__(self, device: torch.device, mapped: frozenset[int] = frozenset()) -> None:
        super().__init__(device, mapped)
        self.stream = torch.Stream(device)
        self._ring: list[Tensor] = []
        self._free: list[Mark] = [None] * RING_PARTS  # the event after which a part of the ring may be written again
        self._next = 0

    def memory(self, size_bytes: int, *, on_host: bool) -> Tensor:
        if on_host:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        return super().memory(size_bytes, on_host=False)

    def start(self, copies: Pairs, after: Mark) -> Copy:
        if all(source.device.type != "cpu" or source.is_pinned() for _, source in copies):
            return self._send(copies, after)
        return self._worker.submit(self._send, copies, after, through_ring=True)

    def wait(self, copy: Copy) -> None:
        event = copy.result() if isinstance(copy, Future) else copy
        if event is not None:
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
                if target.device.type != "cpu":  # its memory is not given to others before the copy is made
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
        """One part of the ring filled, and sent off."""
        if not self._ring:
            self._ring = [self.memory(RING_BYTES, on_host=True) for _ in range(RING_PARTS)]
        part = self._next
        self._next = (part + 1) % RING_PARTS
        self.finish(self._free[part])
        pinned = self._ring[part][: source.numel()]
        copy_bytes(pinned, source)
        target.copy_(pinned, non_blocking=True)
        self._free[part] = self.stream.record_event()
