"""Stores a packed base in one cache file (the sidecar), so that later runs can map the file into memory.

The format is safetensors. Each tensor starts at a multiple of 64 bytes, and each layer at a page. Filler tensors are
between them, because the format allows no gaps. The header contains the key, and the last 32 bytes are the sha256 of
all bytes before. If the key or the sha256 differs, the file is written again.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from tunekit.errors import ModelError
from tunekit.files.cache_folder import is_own
from tunekit.files.durable import atomic_file
from tunekit.files.tensors import make_header, read_tensor_header, tensor_bytes
from tunekit.files.untrusted import MODEL_FILE
from tunekit.model.storage.mapped_files import CHUNK_BYTES, MappedFiles

ALIGNMENT_BYTES, LAYER_ALIGNMENT_BYTES = 64, 4096
MIN_BYTES = 32 * 2**20  # a smaller base is packed again each time
SPARE_BYTES = 2**30  # disk space that stays free
FILLER = "__filler__."
DIGEST_BYTES = 32


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the cache file. `layer`: the module name of its layer; empty for a tensor outside the layers."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: str

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Sidecar:
    """An opened sidecar file. All tensors are views of one shared read-only mapping. Nothing may write to a view."""

    def __init__(self, path: Path, layout: list[StoredTensor]) -> None:
        self.path = path
        self.names = [place.name for place in layout]  # in file order
        self.files = MappedFiles(path.parent, read_tensor_header(path, MODEL_FILE))

    def view(self, name: str) -> Tensor:
        """One tensor, aligned to 64 bytes."""
        return self.files.view(name)


def open_sidecar(path: Path, key: str, layout: list[StoredTensor]) -> Sidecar | None:
    """The opened file, if it is complete and has this key and layout; otherwise None."""
    header = _header(layout, key)
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            if not is_own(path) or file.read(len(header)) != header:
                return None
            digest.update(header)
            left = path.stat().st_size - len(header) - DIGEST_BYTES
            while left > 0 and (count := file.readinto(memoryview(buffer)[:left])):
                digest.update(memoryview(buffer)[:count])
                left -= count
            complete = file.read() == digest.digest()
        return Sidecar(path, layout) if complete else None
    except (ModelError, OSError):
        return None


def write_sidecar(path: Path, key: str, layout: list[StoredTensor], tensors: Iterator[tuple[str, Tensor]]) -> Sidecar:
    """Write the tensors to the file, then open the file. `tensors` yields them in the order of `layout`, whole or as
    consecutive parts; none is kept in memory.

    Raises: OSError or TunekitError if the file cannot be written; no partial file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(place.size_bytes for place in layout) + SPARE_BYTES
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(f"{path.parent} has {free} bytes free, but {needed} are needed")
    with atomic_file(path) as file:
        file.write(_header(layout, key))
        position = 0
        for place, start, (name, parts) in zip(layout, _starts(layout), groupby(tensors, itemgetter(0)), strict=True):
            file.write(bytes(start - position))
            position = start
            for _, part in parts:
                file.write(tensor_bytes(part))
                position += part.nbytes if part.dtype == place.dtype else 0
            if (name, position) != (place.name, start + place.size_bytes):
                raise ModelError(f"{name} does not match its place in the cache file, {place}")
        file.write(bytes.fromhex(file.sha256))
    return Sidecar(path, layout)


def remove_others(path: Path, prefix: str) -> None:
    """Remove all other cache files with this prefix. They were made from older versions of the same base."""
    for other in path.parent.glob(f"{prefix}*.safetensors"):
        if other != path:
            with contextlib.suppress(OSError):
                other.unlink()


def _starts(layout: list[StoredTensor]) -> list[int]:
    """The offset of each tensor, counted from the start of the data section. Each layer starts at a page."""
    starts, position, layer = [], 0, ""
    for place in layout:
        position += -position % (ALIGNMENT_BYTES if place.layer == layer else LAYER_ALIGNMENT_BYTES)
        starts.append(position)
        position, layer = position + place.size_bytes, place.layer
    return starts


def _header(layout: list[StoredTensor], key: str) -> bytes:
    """The first bytes of the file: the length of the header, and the header, padded so that the data after it starts at
    a page."""
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    position = 0
    for place, start in zip(layout, _starts(layout), strict=True):
        if start > position:
            entries.append((f"{FILLER}{len(entries)}", torch.uint8, (start - position,)))
        entries.append((place.name, place.dtype, place.shape))
        position = start + place.size_bytes
    entries.append((f"{FILLER}digest", torch.uint8, (DIGEST_BYTES,)))
    return make_header(entries, {"format": "pt", "key": key}, LAYER_ALIGNMENT_BYTES)
