"""A loaded base in one file of the cache folder, as it is held: packed once, mapped from then on.

Comes in: a key, the tensors' layout, and the tensors one after the other.  Goes out: `Sidecar`, views into the file.
Next: load.py puts the views into the net, memory/ streams layers from them.

A safetensors file.  Each tensor starts at a multiple of 64 bytes and each layer at one of a page; filler tensors stand
between them, since the format allows no gaps.  It is written beside its place and renamed into it; its header holds the
key and a checksum of all the rest, and a file that differs from either is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunekit.errors import ModelError
from tunekit.files.tensors import NAMES, read_file_header, read_raw_header
from tunekit.model.storage.reading import CHUNK_BYTES, MappedFiles

ALIGNMENT_BYTES, LAYER_ALIGNMENT_BYTES = 64, 4096
LEAST_BYTES = 32 * 2**20  # a smaller base is packed anew each time
SPARE_BYTES = 2**30  # left free on the disk
FILLER = "__filler__."
NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class Place:
    """One tensor of the layout; `layer` is the module name of the layer it belongs to, empty outside of layers."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: str

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Sidecar:
    """An opened file: every tensor a view into one shared read-only mapping. Nothing may write into a view."""

    def __init__(self, path: Path, layout: list[Place]) -> None:
        self.path = path
        self.layers: dict[str, tuple[str, ...]] = {}  # layer -> its tensors' names in file order; "": outside
        for place in layout:
            self.layers[place.layer] = (*self.layers.get(place.layer, ()), place.name)
        self.files = MappedFiles(path.parent, read_file_header(path))

    @property
    def names(self) -> list[str]:
        """Every tensor in file order."""
        return [name for names in self.layers.values() for name in names]

    def view(self, name: str) -> Tensor:
        """One tensor, at a multiple of 64 bytes."""
        return self.files.view(name)

    def layer(self, layer: str) -> dict[str, Tensor]:
        """The tensors of a layer by their names in the net, in file order."""
        return {name: self.view(name) for name in self.layers[layer]}

    def blob(self, layer: str) -> tuple[Tensor, dict[str, int]]:
        """A layer as one (n,) uint8 view, and where in it each tensor starts, a multiple of 64."""
        headers = [self.files.headers[name] for name in self.layers[layer]]
        first = headers[0].offset_bytes
        offsets = {name: each.offset_bytes - first for name, each in zip(self.layers[layer], headers, strict=True)}
        length = headers[-1].offset_bytes + headers[-1].size_bytes - first
        return self.files.view_bytes(headers[0].file, first, length), offsets

    def drop_pages(self, layer: str) -> None:
        """Take a layer's pages out of this process's resident memory; they come back when they are read again."""
        for name in self.layers[layer]:
            self.files.drop_pages(name)


def open_sidecar(path: Path, key: str, layout: list[Place]) -> Sidecar | None:
    """The file, if it is whole, of this key and of this layout; else None."""
    try:
        length, raw = read_raw_header(path)
        facts = raw.get("__metadata__")
        if not isinstance(facts, dict) or facts.get("key") != key:
            return None
        if _header(layout, key, facts.get("sha256", "")) != _first_bytes(path, 8 + length):
            return None
        if facts["sha256"] != _digest_of(path, layout, key, 8 + length):
            return None
        return Sidecar(path, layout)
    except (ModelError, OSError, KeyError, TypeError):
        return None


def write_sidecar(path: Path, key: str, layout: list[Place], tensors: Iterator[tuple[str, Tensor]]) -> Sidecar:
    """Write tensors that come in the layout's order, holding none of them, and open the file.

    Raises: OSError where the folder or the disk does not take it; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(place.size_bytes for place in layout) + SPARE_BYTES
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(f"{path.parent} has {free} bytes free, and {needed} are wanted")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            _write(file, key, layout, tensors)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return Sidecar(path, layout)


def remove_others(path: Path, prefix: str) -> None:
    """Take away files that begin with `prefix` beside the one at `path`: they were made of files that changed."""
    for other in path.parent.glob(f"{prefix}*.safetensors"):
        if other != path:
            with contextlib.suppress(OSError):
                other.unlink()


def _write(file: Any, key: str, layout: list[Place], tensors: Iterator[tuple[str, Tensor]]) -> None:
    header = _header(layout, key, NO_DIGEST)
    digest = hashlib.sha256(header)
    _put(file, header)
    position = 0
    for place, start, (name, tensor) in zip(layout, _starts(layout), tensors, strict=True):
        if (name, tuple(tensor.shape), tensor.dtype) != (place.name, place.shape, place.dtype):
            raise ModelError(f"{name} {tuple(tensor.shape)} {tensor.dtype} comes where {place} belongs")
        numbers: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        for part in (bytes(start - position), memoryview(numbers)):
            digest.update(part)
            _put(file, part)
        position = start + place.size_bytes
    os.pwrite(file.fileno(), digest.hexdigest().encode(), header.index(NO_DIGEST.encode()))


def _put(file: Any, data: bytes | memoryview) -> None:
    """Write all of it."""
    left = memoryview(data)
    while left:
        left = left[file.write(left[: 2**30]) :]


def _starts(layout: list[Place]) -> list[int]:
    """Where each tensor's data starts, counted from the first one's: each layer at a page."""
    found, position, layer = [], 0, ""
    for place in layout:
        position += -position % (ALIGNMENT_BYTES if place.layer == layer else LAYER_ALIGNMENT_BYTES)
        found.append(position)
        position, layer = position + place.size_bytes, place.layer
    return found


def _header(layout: list[Place], key: str, digest: str) -> bytes:
    """Length and header; the data after it starts at a page."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "key": key, "sha256": digest}}
    position = 0
    for place, start in zip(layout, _starts(layout), strict=True):
        if start > position:
            entries[f"{FILLER}{len(entries)}"] = _entry("U8", (start - position,), position, start - position)
        entries[place.name] = _entry(NAMES[place.dtype], place.shape, start, place.size_bytes)
        position = start + place.size_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LAYER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _entry(dtype: str, shape: tuple[int, ...], start: int, size_bytes: int) -> Mapping[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size_bytes]}


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _digest_of(path: Path, layout: list[Place], key: str, start: int) -> str:
    """sha256 of the header without its digest and of all data."""
    digest = hashlib.sha256(_header(layout, key, NO_DIGEST))
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
