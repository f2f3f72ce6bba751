"""Tensors by name into one safetensors file, one tensor at a time, so that memory never holds a second copy.

Comes in: named tensors on any device.  Goes out: a durable file, its size and sha256.  Next: checkpoint.py reads it
back through the safetensors package.  Layout: 8 bytes header length, JSON header padded to 8, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunekit.errors import AdapterError, ModelError
from tunekit.files.durable import DurableFile
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

NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000


def tensor_header(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """The file's header and the order of its tensors: widest type first, so that each lies aligned, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise TypeError(f"{name}: {tensor.dtype} has no place in a safetensors file")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of one tensor in row order, on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)  # (elements,)
    return flat.view(torch.uint8).numpy().data


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write a new durable file; returns its size in bytes and its sha256."""
    header, order = tensor_header(tensors, metadata)
    with DurableFile(path) as file:
        file.write(header)
        for name in order:
            if tensors[name].numel():
                file.write(tensor_bytes(tensors[name]))
    return file.size_bytes, file.sha256


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies and what it is, from the file's header alone; `offset_bytes` counts from the file's start."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_file_header(path: Path) -> dict[str, TensorHeader]:
    """The header of one safetensors file; offsets must tile the file exactly."""
    raw = read_raw_header(path)
    size = path.stat().st_size
    headers, spans = {}, []
    for tensor, entry in raw[1].items():
        if tensor == "__metadata__":
            continue
        try:
            dtype = DTYPES[entry["dtype"]]
            shape = tuple(int(length) for length in entry["shape"])
            start, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"describes {tensor} in a way that cannot be read ({error})", file=str(path)) from error
        if min((*shape, start), default=0) < 0 or math.prod(shape) * dtype.itemsize != end - start:
            raise ModelError(f"gives {tensor} a shape that does not fit its bytes", "fetch it again", file=str(path))
        headers[tensor] = TensorHeader(path.name, dtype, shape, 8 + raw[0] + start)
        spans.append((start, end))
    _check_tiling(path, sorted(spans), size - 8 - raw[0])
    return headers


def _check_tiling(path: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    """Tensors must follow each other without gap or overlap and end where the file ends."""
    position = 0
    for start, end in spans:
        if start != position:
            raise ModelError("has tensors that overlap or leave a gap", "fetch it again", file=str(path))
        position = end
    if position != data_bytes:
        raise ModelError(
            f"is truncated or damaged: {data_bytes} bytes of data where {position} are expected",
            "fetch it again",
            file=str(path),
        )


def read_raw_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length and content of a safetensors header."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError("is missing", "fetch the missing shard", file=str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("is not a regular file", file=str(path))
    with path.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version "):
            raise ModelError("is a Git LFS pointer, not the weights", "run `git lfs pull` there", file=str(path))
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, status.st_size - 8):
            raise ModelError("is not a complete safetensors file", "fetch it again", file=str(path))
        try:
            header = json.loads(stream.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"has a damaged header ({error})", "fetch it again", file=str(path)) from error
    if not isinstance(header, dict):
        raise ModelError("has a damaged header", "fetch it again", file=str(path))
    return length, header


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
