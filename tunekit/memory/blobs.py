"""The frozen tensors of a layer in one contiguous block of memory (a blob). The blob is on the host until the layer is
computed.

Every tensor starts at a multiple of 64 bytes, as in torch's own allocations. At other addresses, some kernels use a
different algorithm, whose sums differ in the last bit.
"""

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNMENT_BYTES = 64
UNSET_BYTE = 0xFF  # written to layers that are not on the device: NaN in every floating dtype


class LayerBlob:
    """The frozen tensors of one layer, and their values on the host. `source`: these values, as one tensor for each of
    `tensors`; after `gather`, as a single blob. `starts`: the positions of the tensors in a blob, in bytes.

    The modules keep their tensor objects; only the memory behind these objects changes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors, self.starts, self.size_bytes = list(tensors), list[int](), 0
        for tensor in tensors:
            self.starts.append(self.size_bytes)
            self.size_bytes = align(self.size_bytes + tensor.nbytes)
        self.source: list[Tensor] = [tensor.data for tensor in tensors]
        self.gathered = False  # whether the source is one blob

    def views(self, blob: Tensor) -> list[Tensor]:
        """The layer's tensors inside a blob (bytes,) uint8."""
        return [
            blob[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(self.tensors, self.starts, strict=True)
        ]

    def gather(self, blob: Tensor, mapped: frozenset[int]) -> None:
        """Copy all values into `blob` (bytes,) uint8, which becomes the new source. Then a single copy moves the whole
        layer.

        `mapped`: the memory addresses of values in mapped files. The pages of these values are released after the copy.
        """
        for view, values in zip(self.views(blob), self.source, strict=True):
            view.copy_(values)
            if values.data_ptr() in mapped:
                forget_pages(values)
        self.source, self.gathered = [blob], True

    def copies(self, slot: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The copies that load the layer into `slot` (bytes,), as (target, source) pairs."""
        if self.gathered:
            return [(slot[: self.size_bytes], self.source[0])]
        return list(zip(self.views(slot), self.source, strict=True))

    def bind(self, slot: Tensor) -> None:
        """Make the layer's modules use the values in `slot`."""
        for tensor, view in zip(self.tensors, self.views(slot), strict=True):
            tensor.data = view

    def bind_source(self) -> None:
        """Make the layer's modules use the values on the host."""
        values = self.views(self.source[0]) if self.gathered else self.source
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value

    def unbind(self, device: torch.device) -> None:
        """Replace the values of the layer's modules by NaN. If the layer is used by mistake while it is not on the
        device, the result is NaN."""
        for tensor in self.tensors:
            bits = torch.full((tensor.itemsize,), UNSET_BYTE, dtype=torch.uint8, device=device)
            tensor.data = bits.view(tensor.dtype).view(()).expand(tensor.shape)


def align(size_bytes: int) -> int:
    """The next multiple of ALIGNMENT_BYTES."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def frozen_tensors(layer: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a layer, without duplicates, in the order of its modules. Call this function before
    an adapter is attached."""
    tensors: dict[int, Tensor] = {}
    for module in layer.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensors.setdefault(id(tensor), tensor)
    return list(tensors.values())


def forget_pages(values: Tensor) -> None:
    """Release the memory pages of a tensor that is mapped from a file.

    The pages no longer count as resident memory of this process, and may stay in the file cache; the next read loads
    them again. For a tensor that is not mapped from a file, this would destroy the values.
    Source: madvise(2), MADV_DONTNEED.
    """
    if values.numel() == 0 or not hasattr(mmap, "MADV_DONTNEED"):
        return
    page = mmap.PAGESIZE
    start = values.data_ptr() // page * page
    stop = -(-(values.data_ptr() + values.nbytes) // page) * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
