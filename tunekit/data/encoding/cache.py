"""The token cache: encoded rows of a source, kept under a hash of everything that decides them.

Comes in: a key and a function that encodes.  Goes out: TokenStore and the facts stored beside it.  An entry is written
beside its place and renamed into it; one that does not match its own checksums is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tunekit.data.encoding.store import FILES, StoreWriter, TokenStore, map_store, memory_streams, store_from_memory
from tunekit.data.reading.data_file import content_hash
from tunekit.files.durable import whole_folder

Facts = dict[str, Any]
# Whatever decides an id or a mask of an encoded row, wherever it lies.
CODE = ("data", "formats", "objectives", "recipe/objectives", "recipe/data.py", "model/text")
PACKAGES = ("tunekit", "transformers", "tokenizers", "jinja2")
Fill = Callable[[StoreWriter], Facts]


def hash_of(value: Any) -> str:
    """sha256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def can_keep(folder: Path) -> bool:
    """Whether entries can be written there, as far as that shows before one is."""
    try:
        (folder / "tokens").mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder / "tokens", os.W_OK)


def has_entry(folder: Path, key: str) -> bool:
    """Whether there is an entry, without a look at whether it is whole."""
    return (folder / "tokens" / key / "meta.json").is_file()


def cached_store(folder: Path, key: str, fill: Fill, *, only_on_disk: bool = False) -> tuple[TokenStore, Facts]:
    """The entry `key`, made by `fill` if it is absent or damaged; kept in memory if the folder cannot be written.

    Raises: OSError in that case, with `only_on_disk`.
    """
    place = folder / "tokens" / key
    found = _load_entry(place)
    if found is not None:
        return found
    shutil.rmtree(place, ignore_errors=True)  # a damaged one
    try:
        with whole_folder(place) as work:
            _fill_folder(work, fill)
    except OSError:
        if only_on_disk:
            raise
    found = _load_entry(place)
    if found is None and only_on_disk:
        raise OSError(f"{place} cannot be replaced")
    return found or _fill_memory(fill)


def _fill_memory(fill: Fill) -> tuple[TokenStore, Facts]:
    streams = memory_streams()
    facts = fill(StoreWriter(streams))
    return store_from_memory(streams), facts


def _fill_folder(work: Path, fill: Fill) -> None:
    with ExitStack() as stack:
        writer = StoreWriter([stack.enter_context((work / name).open("wb")) for name in FILES])
        facts = fill(writer)
    meta = {"sha256": writer.hashes(), "facts": facts}
    (work / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _load_entry(place: Path) -> tuple[TokenStore, Facts] | None:
    """The entry if it is whole: every file has the checksum noted for it."""
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        if any(content_hash(place / name) != meta["sha256"][name] for name in FILES):
            return None
        facts: Facts = meta["facts"]
        return map_store(place), facts
    except (OSError, ValueError, KeyError, TypeError):
        return None
