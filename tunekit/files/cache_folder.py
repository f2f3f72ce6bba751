"""The cache folder. It contains results that can be computed again, such as encoded rows and packed bases."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tunekit.files.durable import is_real_folder, remove_tree, unlink

ENTRY_NAMES = {  # folder of the cache -> names of its entries, also while they are being written
    "tokens": re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}-\w+"),
    "bases": re.compile(r"\.?[0-9a-f]{16}-[0-9a-f]{32}\.safetensors(\.part-\d+)?"),
    "models": re.compile(r"tiny-llama-v1|\.tiny-llama-v1-\w{8}"),
    "images": re.compile(r"\.?[0-9a-f]{64}\.features(-\d+)?"),
    "kernels": re.compile(r"[0-9a-f]{64}\.so|\.tunekit-kernels-\w{8}"),
}
PACKAGE = Path(__file__).resolve().parent.parent


def default_cache_folder() -> Path:
    """TUNEKIT_CACHE, else $XDG_CACHE_HOME/tunekit, else ~/.cache/tunekit."""
    if named := os.environ.get("TUNEKIT_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "tunekit"


def cache_entries() -> list[Path]:
    """The cached files and folders. Linked folders are not entered. Files with names of other programs are left out."""
    folders = [folder for name in ENTRY_NAMES if is_real_folder(folder := default_cache_folder() / name)]
    return [
        entry
        for folder in folders
        for entry in sorted(folder.iterdir())
        if ENTRY_NAMES[folder.name].fullmatch(entry.name)
    ]


def clear_cache() -> None:
    """Remove all cache entries, and the folders that become empty. Raises: RunFolderError if one cannot be removed."""
    for entry in cache_entries():
        (remove_tree if is_real_folder(entry) else unlink)(entry)
    folder = default_cache_folder()
    for path in (*(folder / name for name in ENTRY_NAMES), folder):
        with contextlib.suppress(OSError):  # a link, or not empty
            path.rmdir()


def is_own(path: Path) -> bool:
    """Whether this user or the administrator wrote a cache entry. In a shared cache, nobody checked the entries of
    other users."""
    return not hasattr(os, "getuid") or path.stat().st_uid in (os.getuid(), 0)


def hash_of(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def code_version(places: Sequence[str], packages: Sequence[str]) -> str:
    """sha256 of the code in `places` (files or folders of this package) and of the versions of `packages`.

    Raises: FileNotFoundError if a place does not exist any more, because its code was moved.
    """
    digest = hashlib.sha256()
    for place in places:
        paths = [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).rglob("*.py"))
        if not paths:
            raise FileNotFoundError(f"no code in {place}")
        for path in paths:
            digest.update(path.read_bytes())
    for package in packages:
        try:
            digest.update(f"{package}={version(package)}".encode())
        except PackageNotFoundError:
            digest.update(f"{package} is not installed".encode())
    return digest.hexdigest()
