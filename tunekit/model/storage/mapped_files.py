"""Reads the tensors of a folder's safetensors files, as views of shared read-only mappings or as copies."""

import math
import mmap
import warnings
from pathlib import Path

import torch
from torch import Tensor

from tunekit.files.tensors import TensorEntry, fill_from_file
from tunekit.files.untrusted import MODEL_FILE

CHUNK_BYTES = 4 * 2**20  # size of one read, in addition to the target tensor


class MappedFiles:
    """Tensors of a folder's safetensors files, as views of shared read-only mappings or as copies."""

    mapped = True
    extra_bytes = 0  # memory for reading a tensor, in addition to the tensor and CHUNK_BYTES

    def __init__(self, folder: Path, headers: dict[str, TensorEntry]) -> None:
        self.folder, self.headers = folder, headers
        self._maps: dict[str, mmap.mmap] = {}

    def view(self, name: str) -> Tensor:
        """The tensor as a view of its file. Never write to this view: that would crash the process."""
        header = self.headers[name]
        count = math.prod(header.shape)
        if not count:
            return torch.empty(header.shape, dtype=header.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the mapping is read-only, which is intended
            mapping, offset = self._map(header.file), header.offset_bytes
            return torch.frombuffer(mapping, dtype=header.dtype, count=count, offset=offset).reshape(header.shape)

    def read(self, name: str) -> Tensor:
        """A copy of the tensor in its stored dtype."""
        entry = self.headers[name]
        target = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: Tensor, skipped: int = 0) -> None:
        """Copy the stored tensor into `target` (same shape, any strides and dtype). The file is read in small chunks.

        `skipped`: elements of the stored tensor that come before those of `target`.
        """
        header = self.headers[name]
        path = self.folder / header.file
        item_bytes = header.dtype.itemsize
        start = header.offset_bytes + skipped * item_bytes
        with path.open("rb", buffering=0) as file:
            direct = target.dtype == header.dtype and target.is_contiguous() and target.device.type == "cpu"
            if direct:
                fill_from_file(file.fileno(), start, target, path, MODEL_FILE)
                return
            rows = target.view(-1) if target.is_contiguous() else target
            row_elements = math.prod(rows.shape[1:])
            step = max(1, CHUNK_BYTES // max(1, row_elements * item_bytes))
            for first in range(0, rows.shape[0], step):
                part = rows[first : first + step]
                stored = torch.empty(part.shape, dtype=header.dtype)
                offset = start + first * row_elements * item_bytes
                fill_from_file(file.fileno(), offset, stored, path, MODEL_FILE)
                part.copy_(stored)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self.folder / file).open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]
