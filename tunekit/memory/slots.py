"""Which layers are on the device, and when: a few slots that layers pass through, each copied in before it is needed.

Comes in: LayerBlobs in the order of the layers.  Goes out: `holding(layer)`, a block in which that layer can be
computed.

A copy goes on beside the computation. Two things make it safe: nothing is computed in a slot before its
copy has ended, and no copy into a slot begins before what was computed in it has ended.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.errors import TunekitError
from tunekit.memory.blobs import UNSET_BYTE, LayerBlob
from tunekit.memory.copies import Copier, Copy, Mark

SLOTS = 2  # one to compute in, one to copy into


@dataclass(eq=False)
class DeviceSlot:
    """Memory for one layer: (bytes,) uint8 on the device."""

    memory: Tensor
    layer: int | None = None
    copy: Copy = None  # the copy that brings `layer` in, until it has been waited for
    used: Mark = None  # the mark after its allocation, then after the last computation in this slot


@dataclass
class LayerSlots:
    """`blobs` pass through `count` slots on `device`. `poison`: overwrite what is evicted with NaN, to prove that
    nothing reads it; costs a pass over memory."""

    blobs: Sequence[LayerBlob]
    copier: Copier
    device: torch.device
    count: int = SLOTS
    poison: bool = False
    copies: int = 0  # of layers into slots, so far
    waiting: Tensor | None = None  # of a simulation: memory that stands for what waits on the host

    def __post_init__(self) -> None:
        largest = max(blob.size_bytes for blob in self.blobs)
        count = min(max(self.count, SLOTS), len(self.blobs))
        memories = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(count)]  # (bytes,) each
        # What had a slot's memory before may still be computed.
        self.slots = [DeviceSlot(memory, used=self.copier.mark()) for memory in memories]
        self._computed: int | None = None
        for slot in self.slots if self.poison else ():
            slot.memory.fill_(UNSET_BYTE)
        for blob in self.blobs:
            blob.unbind(self.device)

    @contextmanager
    def holding(self, layer: int, then: int | None = None) -> Iterator[None]:
        """A block in which `layer` is in its slot; `then` is copied in meanwhile. Inside a block for the same layer
        nothing is done."""
        if self._computed == layer:
            yield
            return
        if self._computed is not None:
            raise TunekitError(f"layer {layer} is wanted while layer {self._computed} is computed")
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
        """The slot of `layer`, with its copy begun where it was not there; the layer farthest from it makes room, but
        not `other`."""
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
        """An empty slot, or the one whose layer is farthest away, emptied."""
        empty = [slot for slot in self.slots if slot.layer is None]
        if empty:
            return empty[0]
        taken = [slot for slot in self.slots if slot.layer not in (self._computed, other)]
        taken = taken or [slot for slot in self.slots if slot.layer != self._computed]
        slot = max(taken, key=lambda each: abs((each.layer or 0) - layer))
        self.copier.wait(slot.copy)  # brought in and never used, it may still be under way
        slot.copy = None
        assert slot.layer is not None
        self.blobs[slot.layer].unbind(self.device)
        if self.poison:
            self.copier.finish(slot.used)
            slot.memory.fill_(UNSET_BYTE)
            slot.used = self.copier.mark()
        slot.layer = None
        return slot

    def drop(self) -> None:
        """Empty every slot: the sources were changed, or nothing is computed for a while."""
        for slot in self.slots:
            self.copier.wait(slot.copy)
            if slot.layer is not None:
                self.blobs[slot.layer].unbind(self.device)
            slot.layer = slot.copy = None


def waiting_tensor(slots: LayerSlots, tier: str, device: torch.device) -> Tensor:
    """On the meta device, the memory of a CPU that layers outside of slots take: all of it, or of mapped files the one
    tensor that is being copied; nothing if the device has memory of its own."""
    size = 0
    if device.type == "cpu" and tier == "host":
        size = sum(blob.size_bytes for blob in slots.blobs)
    elif device.type == "cpu":
        size = max(piece.tensor.nbytes for blob in slots.blobs for piece in blob.pieces)
    return torch.empty(size, dtype=torch.uint8, device="meta")
