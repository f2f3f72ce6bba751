"""Device memory for streamed layers: a few slots, each large enough for one layer. Each layer is copied into a slot
before it is computed.

Copies run in parallel with the computation. Two rules make this safe: no computation uses a slot before the copy into
this slot has ended, and no copy into a slot starts before the computations that use this slot have ended.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.memory.blobs import UNSET_BYTE, LayerBlob
from tunekit.memory.copies import Copier, Copy, Mark

SLOTS = 2  # one to compute in, one to copy into


@dataclass(eq=False)
class DeviceSlot:
    """Memory for one layer: (bytes,) uint8 on the device."""

    memory: Tensor
    layer: int | None = None
    copy: Copy = None  # the copy that brings `layer` in, until it has been waited for
    used: Mark = None  # the mark of the last computation in this slot; at first, of the slot's allocation


@dataclass
class LayerSlots:
    """Copies layers (`blobs`) into SLOTS slots on `device` when they are needed. `poison`: overwrite evicted layers
    with NaN, to prove that nothing reads them; this costs time."""

    blobs: Sequence[LayerBlob]
    copier: Copier
    device: torch.device
    poison: bool = False
    copies: int = 0  # number of copies of layers into slots so far
    waiting: Tensor | None = None  # in a simulation: stands for the layers that wait on the host
    # of a sharded base: stored on the device outside of the slots: its share, and the largest table
    outside_bytes: int = 0
    elsewhere_bytes: int = 0  # of a sharded base: stored by other ranks only

    def __post_init__(self) -> None:
        largest = max(blob.size_bytes for blob in self.blobs)
        count = min(SLOTS, len(self.blobs))
        memories = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(count)]  # (bytes,) each
        # Earlier computations may still use the memory that became this slot.
        self.slots = [DeviceSlot(memory, used=self.copier.mark()) for memory in memories]
        self._computed: int | None = None
        for slot in self.slots if self.poison else ():
            slot.memory.fill_(UNSET_BYTE)
        for blob in self.blobs:
            blob.unbind(self.device)

    @contextmanager
    def holding(self, layer: int, then: int | None = None) -> Iterator[None]:
        """A context manager: inside the block, `layer` is in a slot, and layer `then` is prefetched. If a surrounding
        block holds the same layer, this block does nothing."""
        if self._computed == layer:
            yield
            return
        if self._computed is not None:
            raise RuntimeError(f"layer {layer} was requested while layer {self._computed} is being computed")
        slot = self._bring(layer, then)
        self.copier.wait(slot.copy)
        slot.copy = None
        self.blobs[layer].bind(slot.memory)
        self._computed = layer
        try:
            if then is not None and len(self.slots) > 1:
                self._bring(then, layer)
            yield
        finally:
            slot.used = self.copier.mark()
            self._computed = None

    def _bring(self, layer: int, other: int | None) -> DeviceSlot:
        """The slot of `layer`. If the layer is in no slot, start to copy it into one. If no slot is free, evict the
        layer that is farthest from `layer`, but preferably not layer `other`."""
        for slot in self.slots:
            if slot.layer == layer:
                return slot
        slot = self._free_slot(layer, other)
        blob = self.blobs[layer]
        slot.layer = layer
        slot.copy = self.copier.start(blob.copies(slot.memory), slot.used)
        self.copies += 1
        return slot

    def _free_slot(self, layer: int, other: int | None) -> DeviceSlot:
        """An empty slot. If there is none, the layer that is farthest from `layer` is evicted, but preferably not layer
        `other`."""
        empty = [slot for slot in self.slots if slot.layer is None]
        if empty:
            return empty[0]
        evictable = [slot for slot in self.slots if slot.layer not in (self._computed, other)]
        evictable = evictable or [slot for slot in self.slots if slot.layer != self._computed]
        slot = max(evictable, key=lambda candidate: abs((candidate.layer or 0) - layer))
        self.copier.wait(slot.copy)  # a prefetched layer that was never used may still be on its way
        slot.copy = None
        assert slot.layer is not None
        self.blobs[slot.layer].unbind(self.device)
        if self.poison:
            self.copier.finish(slot.used)
            slot.memory.fill_(UNSET_BYTE)
            slot.used = self.copier.mark()
        slot.layer = None
        return slot

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """A context manager: inside the block, modules read all layers from the host. The initialisation of another
        run's adapter needs this."""
        self.drop()
        for blob in self.blobs:
            blob.bind_source()
        try:
            yield
        finally:
            for blob in self.blobs:
                blob.unbind(self.device)

    def drop(self) -> None:
        """Empty every slot, because the layers on the host have changed or nothing will be computed for a while."""
        for slot in self.slots:
            self.copier.wait(slot.copy)
            if slot.layer is not None:
                self.blobs[slot.layer].unbind(self.device)
            slot.layer = slot.copy = None


def waiting_tensor(slots: LayerSlots, tier: str, device: torch.device) -> Tensor:
    """A meta tensor whose size is the memory that streamed layers need outside of slots. Used if a run on a CPU is
    simulated; for other devices, only a sharded base needs such memory.

    Tier `host`: the size of all layers. Tier `disk`: the size of the largest tensor that is copied from a mapped file.
    """
    size = 0
    if slots.outside_bytes:
        size = slots.outside_bytes
    elif device.type == "cpu" and tier == "host":
        size = sum(blob.size_bytes for blob in slots.blobs)
    elif device.type == "cpu":
        size = max(tensor.nbytes for blob in slots.blobs for tensor in blob.tensors)
    return torch.empty(size, dtype=torch.uint8, device="meta")
