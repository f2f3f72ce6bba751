"""A layer's frozen tensors as one contiguous blob, which stays on the host until the layer is computed.

Every tensor starts at a multiple of 64 bytes, as in torch's own allocations. At other addresses some kernels use a
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
    """The frozen tensors of one layer, and their values on the host. `source`: one tensor with values per entry of
    `pieces`, in the same order; after `gather`, one blob with all values.

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
        """Copy the values into one blob (bytes,) uint8, which becomes the source. A single copy can then move the
        layer.

        `mapped`: addresses of values in mapped files; their pages are released after the copy.
        """
        for piece, values in zip(self.pieces, self.source, strict=True):
            piece.view(blob).copy_(values)
            if values.data_ptr() in mapped:
                forget_pages(values)
        self.source, self.gathered = [blob], True

    def copies(self, slot: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The (target, source) pairs to copy, so that `slot` (bytes,) contains the layer."""
        if self.gathered:
            return [(slot[: self.size_bytes], self.source[0])]
        return [(piece.view(slot), values) for piece, values in zip(self.pieces, self.source, strict=True)]

    def bind(self, slot: Tensor) -> None:
        """Point the layer's modules to the slot."""
        for piece in self.pieces:
            piece.tensor.data = piece.view(slot)

    def bind_source(self) -> None:
        """Point the layer's modules to the values on the host."""
        if self.gathered:
            self.bind(self.source[0])
            return
        for piece, values in zip(self.pieces, self.source, strict=True):
            piece.tensor.data = values

    def unbind(self, device: torch.device) -> None:
        """Point the layer's modules to NaN, so that a layer that is used while it is not on the device gives NaN."""
        for piece in self.pieces:
            bits = torch.full((piece.tensor.itemsize,), UNSET_BYTE, dtype=torch.uint8, device=device)
            piece.tensor.data = bits.view(piece.tensor.dtype).view(()).expand(piece.tensor.shape)


def align(size_bytes: int) -> int:
    """The next multiple of ALIGNMENT_BYTES."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def frozen_tensors(layer: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a layer, each once, in the order of its modules; call it before an adapter is
    attached."""
    tensors: dict[int, Tensor] = {}
    for module in layer.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensors.setdefault(id(tensor), tensor)
    return list(tensors.values())


def forget_pages(values: Tensor) -> None:
    """Release the memory pages of a tensor in a mapped file.

    The pages leave this process's resident memory and may stay in the file cache; a later read brings them back. In
    memory that is not mapped from a file this would destroy the values, so the caller must pass only mapped tensors.
    Source: madvise(2), MADV_DONTNEED.
    """
    if values.numel() == 0 or not hasattr(mmap, "MADV_DONTNEED"):
        return
    page = mmap.PAGESIZE
    start = values.data_ptr() // page * page
    stop = -(-(values.data_ptr() + values.nbytes) // page) * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
