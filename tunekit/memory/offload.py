"""Boundary activations wait on the host: what enters a layer is copied out, and comes back just before it is needed.

Comes in: tensors under keys, in the forward pass.  Goes out: the same tensors, bit for bit, in the backward pass.
Next: checkpointing.py puts the inputs of recomputed layers here.

Copies run beside the computation, in the order in which they were asked for. Two rules keep them apart:
- a copy begins after everything that was computed before it was asked for;
- nobody reads what a copy writes before `wait` on that copy.
A tensor on its way back lies in one of two buffers. `take` says that everything taken before is done with, so that its
buffer may be filled again; the backward pass of a layer is over before that of the layer below begins.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunekit.memory.copies import Copies, CudaCopies, PlainCopies, UncountedCopies, _shaped

LEAST_BYTES = 2 * 2**20  # a smaller copy costs more than it frees
LEAST_TOKENS = 512  # so few are computed faster than they are copied
BUFFERS = 2


@dataclass
class _Waiting:
    """A tensor on the host: its slot, the bytes of that, and how it looked."""

    slot: Any
    slot_bytes: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass
class _Buffer:
    """Memory for one tensor that comes back: whose it is, the copy that fills it, and whether it is being used."""

    memory: Tensor
    key: Hashable = None
    copy: Any = None
    used: bool = False


class BoundaryStore:
    """Tensors under keys, which wait on the host between `put` and `take`.

    `copies`: how they get there; None: they stay where they are. Smaller tensors than `least_bytes`, with fewer tokens
    (all dimensions but the last) than `least_tokens`, or with gaps in memory stay too. Slots are used again.
    Not for several threads that compute at once.
    """

    def __init__(self, copies: Copies | None, least_bytes: int = LEAST_BYTES, least_tokens: int = LEAST_TOKENS) -> None:
        self.copies, self.least_bytes, self.least_tokens = copies, least_bytes, least_tokens
        self.host_bytes = 0  # of all slots, used or not
        self._entries: dict[Hashable, _Waiting | Tensor] = {}
        self._free: dict[int, list[Any]] = {}  # slots by size
        self._buffers: list[_Buffer] = []

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Hashable, tensor: Tensor, *, stays: bool = False) -> None:
        """Keep a tensor, which nobody may change, under a key that is not in use. `stays`: where it is."""
        tensor = tensor.detach()
        if key in self._entries:
            raise ValueError(f"something is kept under {key!r} already")
        if self.copies is None or stays or not self._leaves(tensor):
            self._entries[key] = tensor
            return
        size = 1 << (tensor.nbytes - 1).bit_length()  # as CUDA's allocator of pinned memory rounds
        slot = self._slot(size)
        self.copies.out(tensor, slot)
        self._entries[key] = _Waiting(slot, size, tensor.shape, tensor.dtype)

    def prefetch(self, key: Hashable) -> None:
        """Begin to bring a tensor back, if it is on the host, not on its way, and a buffer is free."""
        entry = self._entries.get(key)
        if isinstance(entry, _Waiting) and self._held(key) is None:
            buffer = self._free_buffer()
            if buffer is not None:
                self._fill(buffer, key, entry)

    def take(self, key: Hashable) -> Tensor:
        """The tensor as it was put; it may be read until the next `take`, or until it is dropped.

        Raises: KeyError where nothing is kept under the key.
        """
        entry = self._entries[key]
        if not isinstance(entry, _Waiting):
            return entry
        assert self.copies is not None
        for buffer in self._buffers:
            if buffer.used:
                self._release(buffer)
        buffer = self._held(key) or self._free_buffer() or self._buffers[0]
        if buffer.key != key:
            self._fill(buffer, key, entry)
        self.copies.wait(buffer.copy)
        buffer.used = True
        if sum(isinstance(each, _Waiting) for each in self._entries.values()) == 1:
            self._buffers = [buffer]  # there is nothing left to bring back
        return _shaped(buffer.memory, entry.shape, entry.dtype)

    def drop(self, key: Hashable) -> None:
        """Forget a tensor, if it is there; its slot may be used again."""
        entry = self._entries.pop(key, None)
        if isinstance(entry, _Waiting):
            assert self.copies is not None
            held = self._held(key)
            if held is not None:
                self._release(held)
            self.copies.released(entry.slot)
            self._free.setdefault(entry.slot_bytes, []).append(entry.slot)
        if not self._entries:
            self._buffers.clear()

    def clear(self) -> None:
        """Forget every tensor and give all memory back."""
        for key in list(self._entries):
            self.drop(key)
        self._free.clear()
        self.host_bytes = 0

    def _leaves(self, tensor: Tensor) -> bool:
        tokens = tensor.numel() // max(1, tensor.shape[-1])
        large = tensor.nbytes >= max(1, self.least_bytes) and tokens >= self.least_tokens
        return large and tensor.is_contiguous()

    def _slot(self, size: int) -> Any:
        free = self._free.get(size)
        if free:
            return free.pop()
        assert self.copies is not None
        self.host_bytes += size
        return self.copies.slot(size)

    def _held(self, key: Hashable) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.key == key), None)

    def _free_buffer(self) -> _Buffer | None:
        free = next((buffer for buffer in self._buffers if buffer.key is None), None)
        if free is None and len(self._buffers) < BUFFERS:
            assert self.copies is not None
            free = _Buffer(self.copies.buffer(0))
            self._buffers.append(free)
        return free

    def _fill(self, buffer: _Buffer, key: Hashable, entry: _Waiting) -> None:
        assert self.copies is not None
        if buffer.memory.numel() < entry.bytes:
            buffer.memory = self.copies.buffer(entry.bytes)
        buffer.copy = self.copies.back(entry.slot, _shaped(buffer.memory, entry.shape, entry.dtype))
        buffer.key, buffer.used = key, False

    def _release(self, buffer: _Buffer) -> None:
        assert self.copies is not None
        buffer.key, buffer.copy, buffer.used = None, None, False
        self.copies.released(buffer.memory)


def make_store(setting: str | bool, device: torch.device, *, simulated: bool = False) -> BoundaryStore:
    """The store that `memory.activation_offload` asks for on this device.

    `auto`: on CUDA, tensors of at least LEAST_BYTES and LEAST_TOKENS leave. `true`: every tensor, on a CPU too.
    `simulated`: tensors are on the meta device, as they would be on `device`.
    """
    on_gpu = device.type == "cuda"
    if setting is False or (setting == "auto" and not on_gpu):
        return BoundaryStore(None)
    copies: Copies
    if simulated:
        meta = torch.device("meta")
        copies = UncountedCopies(meta) if on_gpu else PlainCopies(meta)
    else:
        copies = CudaCopies(device) if on_gpu else PlainCopies(device)
    return BoundaryStore(copies) if setting == "auto" else BoundaryStore(copies, 0, 0)
