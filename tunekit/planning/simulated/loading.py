"""Peak host memory while a base is loaded, and the bytes of a mapped file that are never read.

There are three ways to load tensors. A tensor that has the dtype of the computation and is aligned to 64 bytes is
mapped from its file; its pages become resident when they are read. Other tensors are copied or packed (quantized) one
after the other, without mapping the file. If only transformers can read the base, tensors are copied or packed while
their file is mapped.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tunekit.model.families import text_config
from tunekit.model.quantized.four_bit import WORKING_BYTES
from tunekit.model.storage.reading import CHUNK_BYTES

FAULT_BYTES = 2 * 2**20  # Linux maps up to this many bytes around each page that is read
# What gguf's reader holds for each token of a vocabulary: its text, type and merge as arrays of their own. Measured:
# 158.8 MiB for a file with 49,152 tokens and 48,900 merges (gguf 0.19).
TOKEN_BYTES = 3_400


@dataclass(frozen=True)
class StoredBase:
    """The base on disk: its size and its format. `converted`: whether some tensors must be converted to the dtype of
    the computation."""

    file_bytes: int
    converted: bool
    gguf: bool = False

    @property
    def mapped(self) -> bool:
        """Whether the loaded weights are the mapped file itself, if they are not packed."""
        return not self.converted and not self.gguf


def stored_base(sizes: Iterable[tuple[int, torch.dtype]], dtype: torch.dtype) -> StoredBase:
    """The StoredBase of a safetensors folder. `sizes`: bytes and dtype of each stored tensor."""
    pairs = list(sizes)
    converted = any(kind.is_floating_point and kind != dtype for _, kind in pairs)
    return StoredBase(sum(size for size, _ in pairs), converted)


def load_bytes(stored: StoredBase, dense_bytes: int, loaded_bytes: int, largest_elements: int, packed: bool) -> int:
    """Peak memory while a base is loaded.

    `dense_bytes`: bytes of the base in the dtype of the computation. `loaded_bytes`: bytes of the base after loading.
    A tensor of a GGUF file is unpacked to float32 and then copied, so memory contains two additional copies of the
    largest tensor. A matrix that is packed is copied once.
    """
    if stored.gguf:
        return stored.file_bytes + dense_bytes + 2 * 4 * largest_elements
    if stored.converted:
        return stored.file_bytes + dense_bytes
    return stored.file_bytes + loaded_bytes + 4 * largest_elements if packed else loaded_bytes


def packing_bytes(loaded_bytes: int, largest_elements: int, dtype: torch.dtype) -> int:
    """Peak memory of loading a base that is packed (quantized) while it is read: the base, one matrix, and buffers for
    packing."""
    return loaded_bytes + largest_elements * dtype.itemsize + WORKING_BYTES


def copying_bytes(loaded_bytes: int) -> int:
    """Peak memory of loading a base whose tensors are copied from the files one after the other."""
    return loaded_bytes + CHUNK_BYTES


def parsing_bytes(net: nn.Module) -> int:
    """Bytes that gguf's reader needs for the vocabulary of a GGUF file while the base is loaded."""
    return TOKEN_BYTES * int(text_config(net).vocab_size)


def untouched_bytes(ids: NDArray[np.int64], row_bytes: int, table_bytes: int) -> int:
    """Bytes of a mapped embedding that are never read, if only the tokens in `ids` are looked up."""
    touched = np.unique(np.asarray(ids, dtype=np.int64) * row_bytes // FAULT_BYTES)
    return max(0, table_bytes - len(touched) * FAULT_BYTES)
