"""A bounded cache of tensors on disk. Only its owner can read the files, because they come from a user's images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tunekit.files.cache_folder import is_own

ENDING, DIGEST_BYTES = ".features", 32


class TensorCache:
    """Files KEY.features in a folder: a sha256 of the content, and tensors. If they exceed `limit_bytes` in total, the
    files that were written first are removed. A file that cannot be read or written is left out of the cache."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._size_bytes: int | None = None

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors that `write` stored; None if there are none, or if their file is damaged."""
        path = self._path(key)
        with suppress(OSError, SafetensorError, ValueError):
            content = path.read_bytes() if is_own(path) else b""
            digest, stored = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
            if digest and hashlib.sha256(stored).digest() == digest:
                return load(stored)
        return None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors, completely or not at all."""
        stored = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        if len(stored) > self.limit_bytes:
            return
        path = self._path(key)
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(FileNotFoundError):
                temporary.unlink()
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(hashlib.sha256(stored).digest() + stored)
            temporary.replace(path)
            self._make_room(len(stored))

    def _make_room(self, added_bytes: int) -> None:
        """Remove the oldest files if all files together exceed the limit."""
        if self._size_bytes is not None:
            self._size_bytes += added_bytes
        if self._size_bytes is None or self._size_bytes > self.limit_bytes:
            files = sorted(
                (entry.stat().st_mtime_ns, entry.name, entry.stat().st_size)
                for entry in os.scandir(self.folder)
                if entry.name.endswith(ENDING)
            )
            self._size_bytes = sum(size for _, _, size in files)
            for _, name, size in files:
                if self._size_bytes <= self.limit_bytes:
                    return
                with suppress(FileNotFoundError):  # another process removed it
                    (self.folder / name).unlink()
                self._size_bytes -= size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{ENDING}"
