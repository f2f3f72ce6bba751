"""Where what can be made again is kept between runs: encoded rows, packed bases.

Comes in: the environment.  Goes out: a folder, and the version of the code that fills it.
"""

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

OURS = {  # folder of the cache -> the names that its entries have, also while they are written
    "tokens": re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}-\w+"),
    "bases": re.compile(r"\.?[0-9a-f]{16}-[0-9a-f]{32}\.safetensors(\.part-\d+)?"),
    "models": re.compile(r"\.?tiny-llama-v\d+(-\w+)?"),
}
PACKAGE = Path(__file__).resolve().parent.parent


def default_cache_folder() -> Path:
    """TUNEKIT_CACHE, else $XDG_CACHE_HOME/tunekit, else ~/.cache/tunekit."""
    if named := os.environ.get("TUNEKIT_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "tunekit"


def cache_entries() -> list[Path]:
    """What was kept: the files and folders under names that are given here. A folder that is a link is not looked
    into, and nothing else that lies in the cache folder is ours."""
    folders = [folder for name in OURS if is_real_folder(folder := default_cache_folder() / name)]
    return [
        entry for folder in folders for entry in sorted(folder.iterdir()) if OURS[folder.name].fullmatch(entry.name)
    ]


def clear_cache() -> None:
    """Remove what was kept, and the folders that are empty then. Raises: RunFolderError where it cannot be."""
    for entry in cache_entries():
        (remove_tree if is_real_folder(entry) else unlink)(entry)
    folder = default_cache_folder()
    for each in (*(folder / name for name in OURS), folder):
        with contextlib.suppress(OSError):  # a link, or not empty
            each.rmdir()


def hash_of(value: object) -> str:
    """sha256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def code_version(places: Sequence[str], packages: Sequence[str]) -> str:
    """sha256 of every line of code in `places` (files or folders of this package) and of the versions of `packages`.

    Raises: FileNotFoundError for a place that does not exist, so that none is left out after it has moved.
    """
    digest = hashlib.sha256()
    for place in places:
        found = [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).rglob("*.py"))
        if not found:
            raise FileNotFoundError(f"no code in {place}")
        for path in found:
            digest.update(path.read_bytes())
    for package in packages:
        try:
            digest.update(f"{package}={version(package)}".encode())
        except PackageNotFoundError:
            digest.update(f"{package} is not installed".encode())
    return digest.hexdigest()
