"""The cache of packed (quantized or converted) bases: finds, writes and checks the cache file of a base."""

import os
import shutil
from pathlib import Path

from tunekit.errors import TunekitError
from tunekit.files.cache_folder import code_version, default_cache_folder, hash_of
from tunekit.machine.malloc import trim_heap
from tunekit.model.base_spec import BaseSpec
from tunekit.model.storage import sidecar as files
from tunekit.model.storage.packing import PackedBase
from tunekit.model.storage.shards import shard_files
from tunekit.model.storage.sidecar import Sidecar, open_sidecar, remove_others, write_sidecar
from tunekit.recipe.model import ImageModel

# Code that affects a packed byte or its position.
CODE = ("model/quantized", "model/storage")
PACKAGES = ("torch", "transformers", "bitsandbytes")


def cache_room() -> int:
    """The bytes that a packed base may take in the cache folder; 0 if the folder cannot be written."""
    folder = _folder()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return max(0, shutil.disk_usage(existing).free - files.SPARE_BYTES) if writable else 0


def can_be_cached(size_bytes: int, room: int) -> bool:
    """Whether a packed base of this size can be cached: it is not too small, and the cache folder has room for it."""
    return files.MIN_BYTES <= size_bytes <= room


def lacks_room(size_bytes: int, room: int) -> bool:
    """Whether a packed base of this size should be cached, but cannot be."""
    return size_bytes >= files.MIN_BYTES and size_bytes > room


def _folder() -> Path:
    return default_cache_folder() / "bases"


def cached_base(packed: PackedBase) -> tuple[Sidecar | None, list[str]]:
    """Load the net's tensors from the cache file, or pack them and write the cache file. Returns the opened cache file
    (None if the base was not cached) and notes."""
    if sum(tensor.size_bytes for tensor in packed.layout) < files.MIN_BYTES:
        packed.fill()
        return None, []
    prefix, key = _names(packed.spec)
    path = _folder() / f"{prefix}{key[:32]}.safetensors"
    opened, notes = open_sidecar(path, key, packed.layout), []
    if opened is None:
        try:
            opened = write_sidecar(path, key, packed.layout, packed.iterate_tensors(in_parts=True))
            remove_others(path, prefix)
            if _names(packed.spec)[1] != key:  # changed while it was read
                path.unlink()
                opened = None
        except (OSError, TunekitError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            notes = [f"the packed base is not cached for the next run ({reason})"]
    if opened is None:
        packed.fill()
    else:
        packed.map(opened)
    trim_heap()
    return opened, notes


def _names(spec: BaseSpec) -> tuple[str, str]:
    """The prefix of all cache files of this base, and the key of its current content. The key depends on everything
    that could change a byte of the cache file.

    The fingerprint reads only samples of the base's files, so the key also contains their times and inodes.
    """
    section, source = spec.section, spec.source
    how: dict[str, object] = {"quantization": [section.quantization, section.double_quantization]}
    how |= {"dtype": str(spec.dtype), "device": spec.device.type}
    how |= {"parts": "with images"} if isinstance(section, ImageModel) else {}
    times = {}
    for name in shard_files(source.folder) if source.gguf_file is None else [source.gguf_file]:
        stat = (source.folder / name).stat()
        times[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    base = {"fingerprint": str(spec.fingerprint), "files": times, "code": code_version(CODE, PACKAGES)}
    prefix = hash_of({**how, "folder": str((source.folder / (source.gguf_file or "")).resolve())})[:16]
    return f"{prefix}-", hash_of({**how, **base})
