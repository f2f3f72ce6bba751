"""Safetensors files: a strict reader of headers, and functions that read and write one tensor at a time.

Files may be hostile. Layout: 8 bytes header length, a JSON header, then the tensors' bytes without gaps.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunekit.files.durable import DurableFile
from tunekit.files.untrusted import ADAPTER_FILE, FileKind, open_regular, parse_json, printable, read_exactly

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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
METADATA = "__metadata__"
READ_BYTES = 2**30  # maximum size of one read: the system reads at most 2 GiB
DAMAGED_HOW = "fetch it again"
WRONG_STARTS = {  # beginnings of files that are often mistaken for safetensors
    b"version https://git-lfs": ("is a git-lfs pointer, not the file itself", "fetch it with git lfs pull"),
    b"<": ("is a web page, not the file itself", "download the file again"),
    b"PK\x03\x04": ("is a pickle archive, not safetensors", "convert it to safetensors in a sandbox"),
    b"\x80": ("is a pickle, not safetensors", "convert it to safetensors in a sandbox"),
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's entry in the header. `offset_bytes`: the position of its data from the start of the file `file`."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_raw_header(path: Path, kind: FileKind = ADAPTER_FILE) -> tuple[int, int, dict[str, Any]]:
    """The start and end of the tensors' data in a file, and the parsed header.

    Raises: `kind.error`.
    """
    file = str(path)
    with open_regular(path, kind) as (number, size_bytes):
        start = read_exactly(number, min(size_bytes, 32), path, kind)
        for wrong, (what, how) in WRONG_STARTS.items():
            if start.startswith(wrong) and not start[8:9] == b"{":
                raise kind.error(what, how, file=file)
        length = int.from_bytes(start[:8], "little")
        if size_bytes < 8 or length > size_bytes - 8:
            raise kind.error(f"is truncated or not a safetensors file ({size_bytes} bytes)", DAMAGED_HOW, file=file)
        if length > kind.json_bytes:
            raise kind.error(f"has a header of {length} bytes; at most {kind.json_bytes} are read", file=file)
        os.lseek(number, 8, os.SEEK_SET)
        return 8 + length, size_bytes, parse_json(read_exactly(number, length, path, kind), file, kind.error)


def read_tensor_header(path: Path, kind: FileKind = ADAPTER_FILE) -> dict[str, TensorEntry]:
    """The entries of all tensors, in the order of the file. The tensors' data are not read.

    Checks the header's length, strict JSON, types and shapes, and that the byte ranges fill the file without overlap.
    Raises: `kind.error`.
    """
    file = str(path)
    start, size_bytes, header = read_raw_header(path, kind)
    header.pop(METADATA, None)
    entries = {name: _entry(name, value, path, start, kind) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset_bytes, item[1].size_bytes, item[0])))
    end = start
    for name, entry in ordered.items():
        if entry.offset_bytes != end:
            raise kind.error(f"the bytes of '{printable(name)}' overlap others or leave a gap", DAMAGED_HOW, file=file)
        end += entry.size_bytes
    if end != size_bytes:
        claimed, real = end - start, size_bytes - start
        what = f"is truncated or has extra bytes: {claimed} bytes of tensors, {real} in the file"
        raise kind.error(what, DAMAGED_HOW, file=file)
    return ordered


def _entry(name: str, value: object, path: Path, start: int, kind: FileKind) -> TensorEntry:
    """The entry of one tensor. All its numbers are checked."""
    fault = kind.error(f"the header's entry '{printable(name)}' is malformed", DAMAGED_HOW, file=str(path))
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise fault
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 8 and len(offsets) == 2
    if not lists or not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in [*shape, *offsets]):
        raise fault
    if dtype not in DTYPES:
        raise kind.error(f"'{printable(name)}' has the unknown type {printable(dtype)}", file=str(path))
    entry = TensorEntry(path.name, DTYPES[dtype], tuple(shape), start + offsets[0])
    if entry.size_bytes != offsets[1] - offsets[0]:
        raise fault
    return entry


def read_tensor(path: Path, entry: TensorEntry, kind: FileKind = ADAPTER_FILE) -> Tensor:
    """One tensor in new memory.

    Raises: `kind.error` if the file has become shorter.
    """
    with open_regular(path, kind) as (number, _):
        return _read(number, entry, path, kind)


def iterate_tensors(
    path: Path, header: Mapping[str, TensorEntry], kind: FileKind = ADAPTER_FILE
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a header from read_tensor_header, in the order of the file.

    Raises: `kind.error` if the file has changed since the header was read.
    """
    with open_regular(path, kind) as (number, size_bytes):
        if header and size_bytes != max(entry.offset_bytes + entry.size_bytes for entry in header.values()):
            raise kind.error("changed while it was being read", "try again", file=str(path))
        for name, entry in header.items():
            yield name, _read(number, entry, path, kind)


def _read(number: int, entry: TensorEntry, path: Path, kind: FileKind) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    fill_from_file(number, entry.offset_bytes, tensor, path, kind)
    return tensor


def fill_from_file(number: int, offset: int, target: Tensor, path: Path, kind: FileKind) -> None:
    """Fill `target` with the bytes of an open file from `offset` on. `target` is contiguous, on the CPU.

    Raises: `kind.error` if the file is too short.
    """
    done, memory = 0, tensor_bytes(target)
    with open(number, "rb", buffering=0, closefd=False) as file:
        file.seek(offset)
        while done < len(memory):
            count = file.readinto(memory[done : done + READ_BYTES])
            if not count:
                raise kind.error("ends before its last tensor", DAMAGED_HOW, file=str(path))
            done += count


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of one tensor in row order. A contiguous tensor on the CPU is not copied."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)  # (elements,)
    return flat.view(torch.uint8).numpy().data


def make_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    alignment_bytes: int = 8,
) -> bytes:
    """The length of the header and the header, for tensors in this order. The data after the header is aligned."""
    header: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        if dtype not in NAMES:
            raise TypeError(f"{name}: safetensors files cannot hold {dtype}")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % alignment_bytes)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write a new durable file; returns its size and sha256. Wide types come first, so that every tensor is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    with DurableFile(path) as file:
        file.write(make_header([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered], metadata))
        for _, tensor in ordered:
            file.write(tensor_bytes(tensor))
    return file.size_bytes, file.sha256
