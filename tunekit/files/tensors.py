"""Tensors by name into one safetensors file, one tensor at a time, so that memory never holds a second copy.

Comes in: named tensors on any device.  Goes out: a durable file, its size and sha256.  Next: checkpoint.py reads it
back through the safetensors package.  Layout: 8 bytes header length, JSON header padded to 8, then the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from tunekit.files.durable import DurableFile

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_header(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """The file's header and the order of its tensors: widest type first, so that each lies aligned, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: {tensor.dtype} has no place in a safetensors file")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
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
