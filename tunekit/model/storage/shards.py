"""Safetensors folders read and written one tensor at a time, in bounded memory.

Comes in: a folder of model.safetensors or shards with an index.  Goes out: headers, tensors, folders of that form.
Next: load.py checks headers before anything is allocated; merge.py reads and writes.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tunekit.errors import ModelError, ResourceError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "I16": (torch.int16, 2),
    "I8": (torch.int8, 1),
    "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
}


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


def shard_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold the model, sorted.

    Raises: ModelError for a missing shard, a name that leaves the folder, or pickled weights.
    """
    if (folder / INDEX).exists() and not (folder / SINGLE).exists():
        return sorted(set(_read_index(folder).values()))
    if (folder / SINGLE).exists():
        return [SINGLE]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read",
            "convert it to safetensors in a place where that may happen",
            key="model.name_or_path",
        )
    raise ModelError(
        f"{folder} holds no {SINGLE}",
        "give a folder with safetensors weights, or a .gguf file",
        key="model.name_or_path",
    )


def _read_index(folder: Path) -> dict[str, str]:
    """The index: tensor name -> file name, every file name inside the folder."""
    from tunekit.model.storage.source import read_json

    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("holds no weight_map", "fetch it again", file=str(path))
    for name in {str(value) for value in weight_map.values()}:
        if Path(name).name != name or "\\" in name or name in ("", ".", "..") or not name.endswith(".safetensors"):
            raise ModelError(f"names the file {name!r}, which is not a safetensors file of its folder", file=str(path))
    return {str(key): str(value) for key, value in weight_map.items()}


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor's file, dtype and shape, from the headers, which are checked against the files' sizes.

    Raises: ModelError for a file that is truncated, damaged, no safetensors file, or at odds with the index.
    """
    files = shard_files(folder)
    headers: dict[str, TensorHeader] = {}
    for name in files:
        for tensor, header in read_file_header(folder / name).items():
            if tensor in headers:
                raise ModelError(f"holds {tensor}, which {headers[tensor].file} holds too", file=str(folder / name))
            headers[tensor] = header
    if files != [SINGLE]:
        for tensor, file in _read_index(folder).items():
            if tensor not in headers or headers[tensor].file != file:
                raise ModelError(f"has no tensor {tensor}, which the index expects there", file=str(folder / file))
    return headers


def read_file_header(path: Path) -> dict[str, TensorHeader]:
    """The header of one safetensors file; offsets must tile the file exactly."""
    raw = read_raw_header(path)
    size = path.stat().st_size
    headers, spans = {}, []
    for tensor, entry in raw[1].items():
        if tensor == "__metadata__":
            continue
        try:
            dtype, item_bytes = DTYPES[entry["dtype"]]
            shape = tuple(int(length) for length in entry["shape"])
            start, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"describes {tensor} in a way that cannot be read ({error})", file=str(path)) from error
        if min((*shape, start), default=0) < 0 or math.prod(shape) * item_bytes != end - start:
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


class ShardReader:
    """Tensors of a folder by name, one at a time; a file is open only while one of its tensors is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers = read_headers(folder)

    def __iter__(self) -> Iterator[str]:
        """Names in the order of files and of the data inside them."""
        return iter(self.headers)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, a copy of its own."""
        path = self.folder / self.headers[name].file
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return file.get_tensor(name).clone()  # type: ignore[no-any-return]


class ShardWriter:
    """Writes tensors as they come into shards of at most `max_shard_bytes`, then gives the files their final names."""

    def __init__(self, folder: Path, max_shard_bytes: int = 4 * 2**30) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._names: set[str] = set()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; what is pending is written first where it would exceed the size of a shard."""
        if name in self._names:
            raise ModelError(f"the tensor {name} would be written twice")
        self._names.add(name)
        stored = tensor.detach().to("cpu").contiguous()
        # A view into a larger tensor would be written whole, or refused as shared: keep only its own numbers.
        if stored.untyped_storage().nbytes() != stored.numel() * stored.element_size():
            stored = stored.clone()
        size = stored.numel() * stored.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = stored
        self._pending_bytes += size

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors"
        try:
            save_file(self._pending, str(path), metadata={"format": "pt"})
            _sync(path)
        except (OSError, SafetensorError) as error:
            raise ResourceError(
                f"{path.parent} cannot take {self._pending_bytes} bytes of weights ({error})", "free space there"
            ) from error
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> list[str]:
        """Write the rest; one shard becomes model.safetensors, several get an index. Returns the file names."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for index, name in enumerate(names):
            os.replace(self.folder / f"shard-{index + 1:05d}.safetensors", self.folder / name)
        if count > 1:
            weight_map = {tensor: names[i] for i, shard in enumerate(self._shards) for tensor in shard}
            content = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            path = self.folder / INDEX
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _sync(path)
            names = [*names, INDEX]
        _sync(self.folder)
        return names


def _sync(path: Path) -> None:
    """Make a file, or a folder's list of files, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
