"""The frozen tensors of a layer in one contiguous block of memory (a blob). The blob is on the host until the layer is
computed.

Every tensor starts at a multiple of 64 bytes, as in torch's own allocations. At other addresses, some kernels use a
different algorithm, whose sums differ in the last bit.
"""

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT_BYTES = 64
UNSET_BYTE = 0xFF  # written to layers that are not on the device: NaN in every floating dtype


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a layer: the tensor object of its module, and its position in the blob."""

    tensor: Tensor
    start: int  # in bytes

    def view(self, blob: Tensor) -> Tensor:
        """The tensor inside a blob (bytes,) uint8."""
        return blob[self.start : self.start + self.tensor.nbytes].view(self.tensor.dtype).view(self.tensor.shape)


class LayerBlob:
    """The frozen tensors of one layer, and their values on the host. `source`: these values, as one tensor per entry of
    `pieces`; after `gather`, as a single blob.

    The modules keep their tensor objects; only the memory behind these objects changes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.pieces: list[TensorPlace] = []
        self.size_bytes = 0
        for tensor in tensors:
            self.pieces.append(TensorPlace(tensor, self.size_bytes))
            self.size_bytes = align(self.size_bytes + tensor.nbytes)
        self.source: list[Tensor] = [tensor.data for tensor in tensors]
        self.gathered = False  # whether the source is one blob

    def gather(self, blob: Tensor, mapped: frozenset[int]) -> None:
        """Copy all values into `blob` (bytes,) uint8, which becomes the new source. Then a single copy moves the whole
        layer.

        `mapped`: the memory addresses of values in mapped files. The pages of these values are released after the copy.
        """
        for piece, values in zip(self.pieces, self.source, strict=True):
            piece.view(blob).copy_(values)
            if values.data_ptr() in mapped:
                forget_pages(values)
        self.source, self.gathered = [blob], True

    def copies(self, slot: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The copies that load the layer into `slot` (bytes,), as (target, source) pairs."""
        if self.gathered:
            return [(slot[: self.size_bytes], self.source[0])]
        return [(piece.view(slot), values) for piece, values in zip(self.pieces, self.source, strict=True)]

    def bind(self, slot: Tensor) -> None:
        """Make the layer's modules use the values in `slot`."""
        for piece in self.pieces:
            piece.tensor.data = piece.view(slot)

    def bind_source(self) -> None:
        """Make the layer's modules use the values on the host."""
        if self.gathered:
            self.bind(self.source[0])
            return
        for piece, values in zip(self.pieces, self.source, strict=True):
            piece.tensor.data = values

    def unbind(self, device: torch.device) -> None:
        """Replace the values of the layer's modules by NaN. If the layer is used by mistake while it is not on the
        device, the result is NaN."""
        for piece in self.pieces:
            bits = torch.full((piece.tensor.itemsize,), UNSET_BYTE, dtype=torch.uint8, device=device)
            piece.tensor.data = bits.view(piece.tensor.dtype).view(()).expand(piece.tensor.shape)


def align(size_bytes: int) -> int:
    """The next multiple of ALIGNMENT_BYTES."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def frozen_tensors(layer: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a layer, without duplicates, in the order of its modules. Call this function before
    an adapter is attached."""
    tensors: dict[int, Tensor] = {}
    for module in layer.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
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
