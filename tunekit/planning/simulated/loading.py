"""The most that loading a base takes on the host, and what of a mapped file stays untouched.

A tensor of the computation's dtype aligned to 64 bytes is the mapped file itself, whose pages count as resident once
they are read. Others are copied, or packed, one after the other, and no page of the file is mapped. Where only
transformers can read the base, they are copied, or packed, while their file is still mapped.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.model.quantized.four_bit import WORKING_BYTES
from tunekit.model.storage.reading import CHUNK_BYTES

FAULT_BYTES = 2 * 2**20  # Linux maps this much with each page that is touched, where its cache holds it in one piece


@dataclass(frozen=True)
class StoredBase:
    """The base on disk: bytes in all, whether some tensor has another dtype than the computation, and the container."""

    file_bytes: int
    converted: bool
    gguf: bool = False

    @property
    def mapped(self) -> bool:
        """Whether the loaded weights, if they are not packed, are the mapped file itself."""
        return not self.converted and not self.gguf


def stored_base(sizes: Iterable[tuple[int, torch.dtype]], dtype: torch.dtype) -> StoredBase:
    """From bytes and dtype of every stored tensor of a safetensors folder."""
    pairs = list(sizes)
    converted = any(kind.is_floating_point and kind != dtype for _, kind in pairs)
    return StoredBase(sum(size for size, _ in pairs), converted)


def load_bytes(stored: StoredBase, dense_bytes: int, loaded_bytes: int, largest_elements: int, packed: bool) -> int:
    """Peak of loading: `dense_bytes` is the base in the computation's dtype, `loaded_bytes` what it takes once loaded.

    Of a GGUF file each tensor is unpacked to float32 and copied from there, so that the largest exists twice more.
    To be packed, a matrix is copied once.
    """
    if stored.gguf:
        return stored.file_bytes + dense_bytes + 2 * 4 * largest_elements
    if stored.converted:
        return stored.file_bytes + dense_bytes
    return stored.file_bytes + loaded_bytes + 4 * largest_elements if packed else loaded_bytes


def packing_bytes(loaded_bytes: int, largest_elements: int, dtype: torch.dtype) -> int:
    """Peak of loading a base that is packed while it is read: all of it, one matrix, and what packing needs."""
    return loaded_bytes + largest_elements * dtype.itemsize + WORKING_BYTES


def copying_bytes(loaded_bytes: int) -> int:
    """Peak of loading a base whose tensors are copied out of the files one after the other."""
    return loaded_bytes + CHUNK_BYTES


def untouched_bytes(ids: NDArray[np.int64], row_bytes: int, table_bytes: int) -> int:
    """Bytes of a mapped embedding that rows with these ids never read."""
    touched = np.unique(np.asarray(ids, dtype=np.int64) * row_bytes // FAULT_BYTES)
    return max(0, table_bytes - len(touched) * FAULT_BYTES)
