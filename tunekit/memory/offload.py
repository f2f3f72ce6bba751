"""Offloads the inputs of checkpointed layers: they are copied to the host in the forward pass, and copied back before
the backward pass uses them.

Copies run in parallel with the computation, in the order in which they were started. Two rules keep them consistent:
- A copy starts after all computations that were queued before it.
- Code that reads the target of a copy first calls `wait` on this copy.
While a tensor is copied out, a reference to it is kept until LEAVING later copies have been queued. Then the
computation waits for the copy, and the tensor's memory can be reused at once. (Tensor.record_stream would keep the
memory longer, because the host runs ahead of the device.)
A tensor is copied back into one of two buffers. `take` releases the buffers of tensors that were taken before. This is
safe, because the backward pass of a layer ends before the backward pass of the next layer starts.


Gradient checkpointing of decoder layers, and the random seed of each layer.

Only the input of a recomputed layer is stored; offload.py can move this input to the host.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunekit.errors import ResourceError
from tunekit.machine.devices import kind_of
from tunekit.memory.copies import Copier, Copy, StreamCopier, as_bytes
from tunekit.model.call import calling, current_call, seed_layer

MIN_BYTES = 2 * 2**20  # a smaller copy costs more than it frees
MIN_TOKENS = 512  # fewer tokens are computed faster than they are copied
BUFFERS = 2
LEAVING = 2  # maximum number of tensors that are being copied out


@dataclass
class _OnHost:
    """A tensor that is stored on the host: its memory (`slot_bytes` bytes, uint8), shape and dtype."""

    slot: Tensor
    slot_bytes: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass
class _Buffer:
    """Device memory (bytes,) uint8 for a tensor that is copied back from the host. `key`: the tensor's key; `copy`: the
    copy into this memory; `used`: whether the tensor has been taken."""

    memory: Tensor
    key: Hashable = None
    copy: Copy = None
    used: bool = False


class BoundaryStore:
    """Stores tensors under keys, between `put` and `take`. Large tensors are stored on the host.

    `copier`: makes the copies; None: all tensors stay on their device. A tensor also stays on its device if it has
    fewer than `min_bytes` bytes or `min_tokens` tokens (all dimensions except the last), if it is not contiguous, or
    once the host has no more memory to pin. Host memory is reused. Only one thread may use a store.
    """

    def __init__(self, copier: Copier | None, min_bytes: int = MIN_BYTES, min_tokens: int = MIN_TOKENS) -> None:
        self.offloads = copier is not None
        self.min_bytes, self.min_tokens = min_bytes, min_tokens
        self.host_bytes = 0  # bytes of all slots, used or not
        self._copier = copier or Copier(torch.device("cpu"))
        self._entries: dict[Hashable, _OnHost | Tensor] = {}
        self._free: dict[int, list[Tensor]] = {}  # slots by size
        self._buffers: list[_Buffer] = []
        self._leaving: deque[tuple[Copy, Tensor]] = deque()  # copies and their sources

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Hashable, tensor: Tensor, *, stays: bool = False) -> None:
        """Store a tensor under a new key; nobody may modify the tensor afterwards. `stays`: do not move it to the
        host."""
        tensor = tensor.detach()
        if key in self._entries:
            raise ValueError(f"the key {key!r} is already in use")
        size = 1 << (tensor.nbytes - 1).bit_length()  # as CUDA's allocator of pinned memory rounds
        slot = None if stays or not self._leaves(tensor) else self._slot(size)
        if slot is None:
            self._entries[key] = tensor
            return
        entry = _OnHost(slot, size, tensor.shape, tensor.dtype)
        copy = self._copier.start([(entry.slot[: entry.bytes], as_bytes(tensor))], self._copier.mark())
        self._leaving.append((copy, tensor))
        self._let_go(LEAVING)
        self._entries[key] = entry

    def prefetch(self, key: Hashable) -> None:
        """Start to copy a tensor back from the host. Does nothing if the tensor is not on the host or is already being
        copied back, or if no buffer is free."""
        entry = self._entries.get(key)
        if isinstance(entry, _OnHost) and self._buffer_of(key) is None:
            buffer = self._free_buffer()
            if buffer is not None:
                self._fill(buffer, key, entry)

    def take(self, key: Hashable) -> Tensor:
        """The stored tensor. You may read it until the next call of `take`, or until it is dropped.

        Raises: KeyError for an unknown key.
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
        if sum(isinstance(value, _OnHost) for value in self._entries.values()) == 1:
            self._buffers = [buffer]  # no other tensor has to come back
        return buffer.memory[: entry.bytes].view(entry.dtype).view(entry.shape)

    def drop(self, key: Hashable) -> None:
        """Remove a tensor if it is stored; its host memory can be reused."""
        entry = self._entries.pop(key, None)
        if isinstance(entry, _OnHost):
            buffer = self._buffer_of(key)
            if buffer is not None:
                self._release(buffer)
            self._free.setdefault(entry.slot_bytes, []).append(entry.slot)
        if not self._entries:
            self._buffers.clear()

    def clear(self) -> None:
        """Remove all tensors and release all memory."""
        self._let_go(0)
        for key in list(self._entries):
            self.drop(key)
        self._free.clear()
        self.host_bytes = 0

    def _let_go(self, left: int) -> None:
        """Wait until at most `left` tensors are still being copied to the host."""
        while len(self._leaving) > left:
            copy, _ = self._leaving[0]
            self._copier.wait(copy)
            self._leaving.popleft()

    def _leaves(self, tensor: Tensor) -> bool:
        tokens = tensor.numel() // max(1, tensor.shape[-1])
        large = tensor.nbytes >= max(1, self.min_bytes) and tokens >= self.min_tokens
        return self.offloads and large and tensor.is_contiguous()

    def _slot(self, size: int) -> Tensor | None:
        """Host memory (size,) uint8; None if the host has no more."""
        free = self._free.get(size)
        if free:
            return free.pop()
        try:
            slot = self._copier.memory(size, on_host=True)
        except ResourceError:
            self.offloads = False
            return None
        self.host_bytes += size
        return slot

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
    """The store for the setting `memory.activation_offload` on this device.

    `auto`: on a GPU, tensors of at least MIN_BYTES and MIN_TOKENS are offloaded. `true`: every tensor is offloaded. On
    a CPU this saves nothing, but it allows testing the order of copies.
    `simulated`: tensors are on the meta device, in place of tensors on `device`.
    """
    on_gpu = kind_of(device).own_memory
    if setting is False or (setting == "auto" and not on_gpu):
        return BoundaryStore(None)
    if simulated:
        copier = Copier(torch.device("meta"), counts_host=not on_gpu)
    else:
        copier = StreamCopier(device) if on_gpu else Copier(device)
    return BoundaryStore(copier) if setting == "auto" else BoundaryStore(copier, 0, 0)


def prepare_layers(layers: Sequence[nn.Module], checkpointed: int, store: BoundaryStore | None = None) -> None:
    """Seed the random numbers of every layer when it starts, and recompute the first `checkpointed` layers in the
    backward pass.

    In a seeded Call, a layer's random numbers are a function of (seed, step, micro-batch, layer). So the recomputation
    draws the same dropout masks as the forward, and no state of random generators is stored.
    `store`: stores the inputs of recomputed layers. The input of the last recomputed layer stays on the device, because
    it is needed again at once.
    """
    checkpoints = _Checkpoints(BoundaryStore(None) if store is None else store, checkpointed - 1)
    for number, layer in enumerate(layers):
        run = partial(_seeded, layer.forward, number)
        layer.forward = partial(checkpoints.forward, layer, run, number) if number < checkpointed else run


def _seeded(forward: Callable[..., object], number: int, /, *inputs: object, **named: object) -> object:
    """Run a layer, whose random numbers are seeded when it starts."""
    call = current_call()
    if call.seeded:
        seed_layer(call, number)
    return forward(*inputs, **named)


class _Checkpoints:
    """Runs layers that are recomputed in the backward pass, and puts their inputs into a store. Several forwards can
    have inputs in it at the same time. `last`: the last recomputed layer."""

    def __init__(self, store: BoundaryStore, last: int) -> None:
        self.store, self.last = store, last
        self.forwards = 0  # number of forwards started so far; two can be alive at the same time
        self.newest = -1  # the layer that ran last

    def forward(
        self, layer: nn.Module, run: Callable[..., object], number: int, /, *inputs: object, **named: Any
    ) -> object:
        """Run a layer. The recomputation uses the same Call (adapter bypass and seeds) as the forward."""
        if not (torch.is_grad_enabled() and layer.training):
            return run(*inputs, **named)
        call = current_call()
        hidden, *others = inputs or (named.pop("hidden_states"),)
        assert isinstance(hidden, Tensor)
        if number <= self.newest:  # a new forward, or a layer that runs more than once in a forward
            self.forwards += 1
        self.newest = number
        key = self.forwards, number
        self.store.put(key, hidden, stays=number == self.last)
        stand_in = hidden.new_empty(0)  # shows the device to `checkpoint`, and keeps no memory alive
        return checkpoint(
            _CheckpointedLayer(self.store, key, run, hidden),
            stand_in,
            *others,
            use_reentrant=False,
            preserve_rng_state=not call.seeded,
            context_fn=lambda: (contextlib.nullcontext(), calling(call)),
            **named,
        )


class _CheckpointedLayer:
    """Runs a layer: the forward uses the layer's input, the recomputation uses the stored copy of this input.

    This object and the stored input exist as long as the graph that may recompute the layer.
    """

    def __init__(self, store: BoundaryStore, key: tuple[int, int], run: Callable[..., object], hidden: Tensor) -> None:
        self.store, self.key, self.run = store, key, run
        self.requires_grad = hidden.requires_grad
        self.hidden: Tensor | None = hidden
        weakref.finalize(self, store.drop, key).atexit = False

    def __call__(self, stand_in: Tensor, *inputs: object, **named: object) -> object:
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            hidden = self.store.take(self.key).detach().requires_grad_(self.requires_grad)
            forward, number = self.key
            self.store.prefetch((forward, number - 1))
        return self.run(hidden, *inputs, **named)
