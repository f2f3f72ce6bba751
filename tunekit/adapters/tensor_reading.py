"""Tensors of an adapter file one at a time, by the header that strict_files.py has checked; nothing is mapped.

Comes in: a safetensors file and its header.  Goes out: tensors on the CPU, each a copy of its own.
Next: summary.py, loose_lora.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tunekit.errors import AdapterError
from tunekit.files.untrusted import DTYPE_BYTES, TensorEntry, opened

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def iterate_tensors(path: Path, header: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the order of the file.

    `header` is what read_tensor_header gave: its entries follow each other without a gap to the end of the file.
    Raises: AdapterError where the file has changed since.
    """
    total = sum(_size_bytes(entry) for entry in header.values())
    with opened(path) as (number, size_bytes):
        offset = os.lseek(number, max(size_bytes - total, 0), os.SEEK_SET)
        for name, entry in header.items():
            yield name, _read(number, entry, path)
            offset += _size_bytes(entry)
        if offset != size_bytes:
            raise AdapterError("changed while it was being read", "try again", file=str(path))


def _size_bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]


def _read(number: int, entry: TensorEntry, path: Path) -> Tensor:
    """The next tensor of an open file."""
    data = bytearray(_size_bytes(entry))
    view = memoryview(data)
    done = 0
    while done < len(data):
        count = os.readv(number, [view[done:]])
        if count == 0:
            raise AdapterError("ended while it was being read", "try again", file=str(path))
        done += count
    if not data:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=torch.uint8).view(DTYPES[entry.dtype]).reshape(entry.shape)
