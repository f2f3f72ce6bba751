"""The inputs of checkpointed layers wait on the host: copied out in the forward pass, and back before they are used.

Comes in: tensors under keys, in the forward pass.  Goes out: the same tensors, bit for bit, in the backward pass.

Copies run beside the computation, in the order in which they were asked for. Two rules keep them apart:
- a copy begins after everything that was computed before it was asked for;
- nobody reads what a copy writes before `wait` on that copy.
What is copied out is held until LEAVING later ones were sent off, and what is computed then waits for its copy: its
memory may go to others at once (Tensor.record_stream would keep it for as long as the host runs ahead).
A tensor on its way back lies in one of two buffers. `take` says that everything taken before is done with, so that its
buffer may be filled again; the backward pass of a layer is over before that of the layer below begins.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.machine.devices import kind_of
from tunekit.memory.copies import Copier, Copy, StreamCopier, as_bytes

LEAST_BYTES = 2 * 2**20  # a smaller copy costs more than it frees
LEAST_TOKENS = 512  # so few are computed faster than they are copied
BUFFERS = 2
LEAVING = 2  # tensors on their way out


@dataclass
class _OnHost:
    """A tensor on the host: its slot, (slot_bytes,) uint8, and how it looked."""

    slot: Tensor
    slot_bytes: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass
class _Buffer:
    """(bytes,) uint8 for one tensor that comes back: whose it is, the copy that fills it, whether it is being used."""

    memory: Tensor
    key: Hashable = None
    copy: Copy = None
    used: bool = False


class BoundaryStore:
    """Tensors under keys, which wait on the host between `put` and `take`.

    `copier`: how they get there; None: they stay where they are. Smaller tensors than `least_bytes`, with fewer tokens
    (all dimensions but the last) than `least_tokens`, or with gaps in memory stay too. Slots are used again.
    Not for several threads that compute at once.
    """

    def __init__(self, copier: Copier | None, least_bytes: int = LEAST_BYTES, least_tokens: int = LEAST_TOKENS) -> None:
        self.offloads = copier is not None
        self.least_bytes, self.least_tokens = least_bytes, least_tokens
        self.host_bytes = 0  # of all slots, used or not
        self._copier = copier or Copier(torch.device("cpu"))
        self._entries: dict[Hashable, _OnHost | Tensor] = {}
        self._free: dict[int, list[Tensor]] = {}  # slots by size
        self._buffers: list[_Buffer] = []
        self._leaving: deque[tuple[Copy, Tensor]] = deque()  # copies, and what they read

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Hashable, tensor: Tensor, *, stays: bool = False) -> None:
        """Keep a tensor, which nobody may change, under a key that is not in use. `stays`: where it is."""
        tensor = tensor.detach()
        if key in self._entries:
            raise ValueError(f"something is kept under {key!r} already")
        if stays or not self._leaves(tensor):
            self._entries[key] = tensor
            return
        size = 1 << (tensor.nbytes - 1).bit_length()  # as CUDA's allocator of pinned memory rounds
        entry = _OnHost(self._slot(size), size, tensor.shape, tensor.dtype)
        copy = self._copier.start([(entry.slot[: entry.bytes], as_bytes(tensor))], self._copier.mark())
        self._leaving.append((copy, tensor))
        self._let_go(LEAVING)
        self._entries[key] = entry

    def prefetch(self, key: Hashable) -> None:
        """Begin to bring a tensor back, if it is on the host, not on its way, and a buffer is free."""
        entry = self._entries.get(key)
        if isinstance(entry, _OnHost) and self._buffer_of(key) is None:
            buffer = self._free_buffer()
            if buffer is not None:
                self._fill(buffer, key, entry)

    def take(self, key: Hashable) -> Tensor:
        """The tensor as it was put; it may be read until the next `take`, or until it is dropped.

        Raises: KeyError where nothing is kept under the key.
        """
        entry = self._entries[key]
        if not isinstance(entry, _OnHost):
            return entry
        self._let_go(0)
        for buffer in self._buffers:
            if buffer.used:
                self._release(buffer)
        buffer = self._buffer_of(key) or self._free_buffer() or self._buffers[0]
        if buffer.key != key:
            self._fill(buffer, key, entry)
        self._copier.wait(buffer.copy)
        buffer.used = True
        if sum(isinstance(each, _OnHost) for each in self._entries.values()) == 1:
            self._buffers = [buffer]  # there is nothing left to bring back
        return buffer.memory[: entry.bytes].view(entry.dtype).view(entry.shape)

    def drop(self, key: Hashable) -> None:
        """Forget a tensor, if it is there; its slot may be used again."""
        entry = self._entries.pop(key, None)
        if isinstance(entry, _OnHost):
            buffer = self._buffer_of(key)
            if buffer is not None:
                self._release(buffer)
            self._free.setdefault(entry.slot_bytes, []).append(entry.slot)
        if not self._entries:
            self._buffers.clear()

    def clear(self) -> None:
        """Forget every tensor and give all memory back."""
        self._let_go(0)
        for key in list(self._entries):
            self.drop(key)
        self._free.clear()
        self.host_bytes = 0

    def _let_go(self, left: int) -> None:
        """Hold no more than so many tensors that leave."""
        while len(self._leaving) > left:
            copy, _ = self._leaving[0]
            self._copier.wait(copy)
            self._leaving.popleft()

    def _leaves(self, tensor: Tensor) -> bool:
        tokens = tensor.numel() // max(1, tensor.shape[-1])
        large = tensor.nbytes >= max(1, self.least_bytes) and tokens >= self.least_tokens
        return self.offloads and large and tensor.is_contiguous()

    def _slot(self, size: int) -> Tensor:
        free = self._free.get(size)
        if free:
            return free.pop()
        self.host_bytes += size
        return self._copier.memory(size, on_host=True)

    def _buffer_of(self, key: Hashable) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.key == key), None)

    def _free_buffer(self) -> _Buffer | None:
        free = self._buffer_of(None)
        if free is None and len(self._buffers) < BUFFERS:
            free = _Buffer(self._copier.memory(0, on_host=False))
            self._buffers.append(free)
        return free

    def _fill(self, buffer: _Buffer, key: Hashable, entry: _OnHost) -> None:
        if buffer.memory.numel() < entry.bytes:
            buffer.memory = self._copier.memory(entry.bytes, on_host=False)
        pair = (buffer.memory[: entry.bytes], entry.slot[: entry.bytes])
        buffer.copy = self._copier.start([pair], self._copier.mark())
        buffer.key, buffer.used = key, False

    def _release(self, buffer: _Buffer) -> None:
        buffer.key, buffer.copy, buffer.used = None, None, False


def make_store(setting: str | bool, device: torch.device, *, simulated: bool = False) -> BoundaryStore:
    """The store that `memory.activation_offload` asks for on this device.

    `auto`: on CUDA, tensors of at least LEAST_BYTES and LEAST_TOKENS leave. `true`: every tensor, on a CPU too, where
    it saves nothing and lets the order of copies be tried.
    `simulated`: tensors are on the meta device, as they would be on `device`.
    """
    on_gpu = kind_of(device).own_memory
    if setting is False or (setting == "auto" and not on_gpu):
        return BoundaryStore(None)
    if simulated:
        copier = Copier(torch.device("meta"), counts_host=not on_gpu)
    else:
        copier = StreamCopier(device) if on_gpu else Copier(device)
    return BoundaryStore(copier) if setting == "auto" else BoundaryStore(copier, 0, 0)
