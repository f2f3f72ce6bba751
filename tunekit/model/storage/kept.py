"""A packed base kept between runs: which file holds it, and when that file may be used."""

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

# Whatever decides a packed byte or where it lies.
CODE = ("model/quantized", "model/storage")
PACKAGES = ("torch", "transformers", "bitsandbytes")


def can_be_kept(size_bytes: int) -> bool:
    """Whether a packed base of this size can be kept in a file, as far as the folder and the disk show now."""
    folder = _folder()
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return (
        size_bytes >= files.LEAST_BYTES
        and existing.is_dir()
        and os.access(existing, os.W_OK | os.X_OK)
        and (shutil.disk_usage(existing).free >= size_bytes + files.SPARE_BYTES)
    )


def _folder() -> Path:
    return default_cache_folder() / "bases"


def kept_base(packed: PackedBase) -> tuple[Sidecar | None, list[str]]:
    """Give the net its tensors: from the cache folder, or packed now and kept there if it can be. Returns notes."""
    if sum(each.size_bytes for each in packed.layout) < files.LEAST_BYTES:
        packed.fill()
        return None, []
    prefix, key = _names(packed.spec)
    path = _folder() / f"{prefix}{key[:32]}.safetensors"
    opened, notes = open_sidecar(path, key, packed.layout), []
    if opened is None:
        try:
            opened = write_sidecar(path, key, packed.layout, packed.iterate_tensors())
            remove_others(path, prefix)
            if _names(packed.spec)[1] != key:  # changed while it was read
                path.unlink()
                opened = None
        except (OSError, TunekitError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            notes = [f"the packed base is not kept for the next run ({reason})"]
    if opened is None:
        packed.fill()
    else:
        packed.map(opened)
    trim_heap()
    return opened, notes


def _names(spec: BaseSpec) -> tuple[str, str]:
    """The prefix of the names of all files of this base, and the key, which differs wherever a byte could.

    The fingerprint samples the files' data; their times and inodes tell a change that it does not see.
    """
    section, source = spec.section, spec.source
    how: dict[str, object] = {"quantization": [section.quantization, section.double_quantization]}
    how |= {"dtype": str(spec.dtype), "device": spec.device.type}
    times = {}
    for name in shard_files(source.folder):
        stat = (source.folder / name).stat()
        times[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    base = {"fingerprint": str(spec.fingerprint), "files": times, "code": code_version(CODE, PACKAGES)}
    prefix = hash_of({**how, "folder": str(source.folder.resolve())})[:16]
    return f"{prefix}-", hash_of({**how, **base})
