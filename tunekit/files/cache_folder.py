"""Where what can be made again is kept between runs: encoded rows, packed bases.

Comes in: the environment.  Goes out: a folder, and the version of the code that fills it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent


def default_cache_folder() -> Path:
    """TUNEKIT_CACHE, else $XDG_CACHE_HOME/tunekit, else ~/.cache/tunekit."""
    if named := os.environ.get("TUNEKIT_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "tunekit"


def hash_of(value: Any) -> str:
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
