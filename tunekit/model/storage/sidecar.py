"""A loaded base in one file of the cache folder, as it is held: packed once, mapped from then on.

A safetensors file.  Each tensor starts at a multiple of 64 bytes and each layer at one of a page; filler tensors stand
between them, since the format allows no gaps.  Its header holds the key, and its last 32 bytes are the sha256 of
all before them; a file that differs in either is made anew.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunekit.errors import ModelError
from tunekit.files.durable import whole_file
from tunekit.files.tensors import make_header, read_tensor_header, tensor_bytes
from tunekit.files.untrusted import MODEL_FILE
from tunekit.model.storage.reading import CHUNK_BYTES, MappedFiles

ALIGNMENT_BYTES, LAYER_ALIGNMENT_BYTES = 64, 4096
LEAST_BYTES = 32 * 2**20  # a smaller base is packed anew each time
SPARE_BYTES = 2**30  # left free on the disk
FILLER = "__filler__."
DIGEST_BYTES = 32


@dataclass(frozen=True)
class StoredTensor:
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

    def __init__(self, path: Path, layout: list[StoredTensor]) -> None:
        self.path = path
        self.names = [place.name for place in layout]  # in file order
        self.files = MappedFiles(path.parent, read_tensor_header(path, MODEL_FILE))

    def view(self, name: str) -> Tensor:
        """One tensor, at a multiple of 64 bytes."""
        return self.files.view(name)


def open_sidecar(path: Path, key: str, layout: list[StoredTensor]) -> Sidecar | None:
    """The file, if it is whole, of this key and of this layout; else None."""
    header = _header(layout, key)
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            if file.read(len(header)) != header:
                return None
            digest.update(header)
            left = path.stat().st_size - len(header) - DIGEST_BYTES
            while left > 0 and (count := file.readinto(memoryview(buffer)[:left])):
                digest.update(memoryview(buffer)[:count])
                left -= count
            whole = file.read() == digest.digest()
        return Sidecar(path, layout) if whole else None
    except (ModelError, OSError):
        return None


def write_sidecar(path: Path, key: str, layout: list[StoredTensor], tensors: Iterator[tuple[str, Tensor]]) -> Sidecar:
    """Write tensors that come in the layout's order, holding none of them, and open the file.

    Raises: OSError or TunekitError where the folder or the disk does not take it; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(place.size_bytes for place in layout) + SPARE_BYTES
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(f"{path.parent} has {free} bytes free, and {needed} are wanted")
    with whole_file(path) as file:
        file.write(_header(layout, key))
        position = 0
        for place, start, (name, tensor) in zip(layout, _starts(layout), tensors, strict=True):
            if (name, tuple(tensor.shape), tensor.dtype) != (place.name, place.shape, place.dtype):
                raise ModelError(f"{name} {tuple(tensor.shape)} {tensor.dtype} comes where {place} belongs")
            file.write(bytes(start - position))
            file.write(tensor_bytes(tensor))
            position = start + place.size_bytes
        file.write(bytes.fromhex(file.sha256))
    return Sidecar(path, layout)


def remove_others(path: Path, prefix: str) -> None:
    """Remove files that begin with `prefix` beside the one at `path`: they were made of files that changed."""
    for other in path.parent.glob(f"{prefix}*.safetensors"):
        if other != path:
            with contextlib.suppress(OSError):
                other.unlink()


def _starts(layout: list[StoredTensor]) -> list[int]:
    """Where each tensor's data starts, counted from the first one's: each layer at a page."""
    found, position, layer = [], 0, ""
    for place in layout:
        position += -position % (ALIGNMENT_BYTES if place.layer == layer else LAYER_ALIGNMENT_BYTES)
        found.append(position)
        position, layer = position + place.size_bytes, place.layer
    return found


def _header(layout: list[StoredTensor], key: str) -> bytes:
    """Length and header; the data after it starts at a page."""
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    position = 0
    for place, start in zip(layout, _starts(layout), strict=True):
        if start > position:
            entries.append((f"{FILLER}{len(entries)}", torch.uint8, (start - position,)))
        entries.append((place.name, place.dtype, place.shape))
        position = start + place.size_bytes
    entries.append((f"{FILLER}digest", torch.uint8, (DIGEST_BYTES,)))
    return make_header(entries, {"format": "pt", "key": key}, LAYER_ALIGNMENT_BYTES)
