"""Copies between host and device that run beside the computation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from tunekit.memory.blobs import forget_pages

Pairs = Sequence[tuple[Tensor, Tensor]]
RING_BYTES = 64 * 2**20  # of pinned memory through which a mapped file passes on its way to a GPU
RING_PARTS = 2


class Copies(Protocol):
    """Memory on both sides, and copies between them beside the computation. A slot is memory on the host."""

    def slot(self, size_bytes: int) -> Any: ...

    def buffer(self, size_bytes: int) -> Tensor:
        """(size_bytes,) uint8 where the computation is."""
        ...

    def out(self, tensor: Tensor, slot: Any) -> Any:
        """Begin to copy to the host; returns what `wait` waits for."""
        ...

    def back(self, slot: Any, tensor: Tensor) -> Any:
        """Begin to copy into `tensor`."""
        ...

    def wait(self, copy: Any) -> None:
        """What is computed from here on comes after this copy."""
        ...

    def released(self, memory: Any) -> None:
        """A slot or buffer whose content nobody needs any more."""
        ...


class CudaCopies:
    """Pinned memory, and a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def slot(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def buffer(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def out(self, tensor: Tensor, slot: Tensor) -> Any:
        return self._copy(tensor, _shaped(slot, tensor.shape, tensor.dtype))

    def back(self, slot: Tensor, tensor: Tensor) -> Any:
        return self._copy(_shaped(slot, tensor.shape, tensor.dtype), tensor)

    def wait(self, copy: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(copy)

    def released(self, memory: Tensor) -> None:
        """Nothing to do: a slot is touched by one stream alone, and a buffer is filled after what was computed."""

    def _copy(self, source: Tensor, destination: Tensor) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            destination.copy_(source, non_blocking=True)
            done = self.stream.record_event()
        on_device = source if source.is_cuda else destination
        on_device.record_stream(self.stream)  # its memory is not given to others before the copy is made
        return done


class PlainCopies:
    """The same on a CPU, or on the meta device: both sides are plain memory, and a copy is made at once.

    It saves nothing. It lets the order of copies and the safety of buffers be tried without a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def slot(self, size_bytes: int) -> Tensor:
        return self.buffer(size_bytes)

    def buffer(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def out(self, tensor: Tensor, slot: Tensor) -> Any:
        _shaped(slot, tensor.shape, tensor.dtype).copy_(tensor)

    def back(self, slot: Tensor, tensor: Tensor) -> Any:
        tensor.copy_(_shaped(slot, tensor.shape, tensor.dtype))

    def wait(self, copy: Any) -> None:
        """It was made at once."""

    def released(self, memory: Tensor) -> None:
        """Its content may stay."""


class UncountedCopies(PlainCopies):
    """For the simulation of a GPU: buffers are on the meta device, and slots are no part of the device's memory."""

    def slot(self, size_bytes: int) -> Tensor:
        return self.buffer(0)

    def out(self, tensor: Tensor, slot: Tensor) -> Any:
        """Without values there is nothing to copy."""

    def back(self, slot: Tensor, tensor: Tensor) -> Any:
        """As above."""


def _shaped(memory: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The first bytes of a (N,) uint8 memory as a tensor of this shape."""
    return memory[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


class Copier(Protocol):
    """Starts copies and orders them against the computation."""

    def start(self, copies: Pairs, after: Any) -> Any:
        """Begin copies into one slot, once the computation has passed the mark `after`; returns what wait takes."""
        ...

    def wait(self, copy: Any) -> None:
        """Let nothing that is computed from here on begin before the copy has ended."""
        ...

    def mark(self) -> Any:
        """The computation as far as it has been sent off."""
        ...

    def finish(self, mark: Any) -> None:
        """Wait on the host until the computation has passed the mark."""
        ...


class NoCopies:
    """Of a simulation: values do not matter, and nothing takes time."""

    def start(self, copies: Pairs, after: Any) -> None:
        return None

    def wait(self, copy: Any) -> None:
        return None

    def mark(self) -> None:
        return None

    def finish(self, mark: Any) -> None:
        return None


class ThreadCopier:
    """On a CPU: one thread copies. What is computed on a CPU has ended when its call returns, so marks are nothing.

    `mapped`: addresses of sources that are pages of files, which leave this process's memory once they are copied.
    """

    def __init__(self, mapped: frozenset[int] = frozenset()) -> None:
        self.mapped = mapped
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tunekit-copy")

    def start(self, copies: Pairs, after: Any) -> Future[None]:
        return self._worker.submit(self._copy, copies)

    def wait(self, copy: Future[None]) -> None:
        copy.result()

    def mark(self) -> None:
        return None

    def finish(self, mark: Any) -> None:
        return None

    def _copy(self, copies: Pairs) -> None:
        for target, source in copies:
            copy_bytes(target, source)
            if source.data_ptr() in self.mapped:
                forget_pages(source)


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """One thread, without Python's lock, whatever torch's number of threads is: torch's own copy would take them all
    from the computation."""
    _bytes(target)[...] = _bytes(source)


def _bytes(tensor: Tensor) -> Any:
    """A contiguous tensor of the host as a numpy array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class CudaCopier:
    """On a GPU: copies on a stream of their own, ordered by events; nothing waits on the host.

    Pinned sources are copied straight away. A source in a mapped file passes through a ring of pinned memory, filled
    by a thread of its own: a copy from pageable memory would wait for the device.
    """

    def __init__(self, device: torch.device, mapped: frozenset[int] = frozenset()) -> None:
        self.device, self.mapped = device, mapped
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tunekit-copy")
        self._ring: list[Tensor] = []
        self._free: list[Any] = [None] * RING_PARTS  # the event after which a part of the ring may be written again
        self._next = 0

    def start(self, copies: Pairs, after: Any) -> Any:
        if all(source.is_pinned() for _, source in copies):
            return self._send(copies, after)
        return self._worker.submit(self._through_ring, copies, after)

    def wait(self, copy: Any) -> None:
        event = copy.result() if isinstance(copy, Future) else copy
        torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> Any:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def finish(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()

    def _send(self, copies: Pairs, after: Any) -> Any:
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            return self._record()

    def _record(self) -> Any:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def _through_ring(self, copies: Pairs, after: Any) -> Any:
        torch.cuda.set_device(self.device)
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            for target, source in copies:
                wide, narrow = target.view(-1).view(torch.uint8), source.reshape(-1).view(torch.uint8)
                for start in range(0, narrow.numel(), RING_BYTES):
                    self._pass_on(wide[start : start + RING_BYTES], narrow[start : start + RING_BYTES])
                if source.data_ptr() in self.mapped:
                    forget_pages(source)
            return self._record()

    def _pass_on(self, target: Tensor, source: Tensor) -> None:
        """One part of the ring filled, and sent off."""
        if not self._ring:
            self._ring = [torch.empty(RING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(RING_PARTS)]
        part = self._next
        self._next = (part + 1) % RING_PARTS
        if self._free[part] is not None:
            self._free[part].synchronize()
        pinned = self._ring[part][: source.numel()]
        copy_bytes(pinned, source)
        target.copy_(pinned, non_blocking=True)
        self._free[part] = self._record()
