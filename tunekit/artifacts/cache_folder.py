"""Where what can be made again is kept between runs: encoded rows, packed bases.

Comes in: the environment.  Goes out: a folder.  Next: data/cache.py, model/sidecar.py.
"""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_folder() -> Path:
    """TUNEKIT_CACHE, else $XDG_CACHE_HOME/tunekit, else ~/.cache/tunekit."""
    if named := os.environ.get("TUNEKIT_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "tunekit"
