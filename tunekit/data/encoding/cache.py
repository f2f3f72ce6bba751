"""The token cache: encoded rows of a source, stored under a hash of everything that decides them.

An entry is written to a temporary folder, which is then renamed. An entry with wrong checksums is encoded again.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tunekit.contracts import RowLayout
from tunekit.data.encoding.store import StoreWriter, TokenStore, files_of, map_store, memory_streams, store_from_memory
from tunekit.data.reading.data_file import content_hash
from tunekit.errors import ResourceError
from tunekit.files.cache_folder import is_own
from tunekit.files.durable import FULL, atomic_folder
from tunekit.records import bytes_text

SourceFacts = dict[str, Any]
# All code that decides the ids or masks of encoded rows.
CODE = ("data", "formats", "objectives", "recipe/objectives", "recipe/data.py", "model/text", "model/speech")
PACKAGES = ("tunekit", "transformers", "tokenizers", "jinja2")
MOST_IN_MEMORY_BYTES = 2**30  # of an entry for which the disk has no room
Fill = Callable[[StoreWriter], SourceFacts]


def cached_store(
    folder: Path, key: str, layout: RowLayout, fill: Fill, facts: Sequence[str] = ()
) -> tuple[TokenStore, SourceFacts]:
    """The cache entry `key`. `fill` makes a new entry if there is none, if the files are damaged, or if a value named
    in `facts` is missing (older versions did not write it). If the folder cannot be written, the entry stays in memory.

    Raises: ResourceError if the disk is full, and the entry is too large to stay in memory.
    """
    place = folder / "tokens" / key
    found = _load_entry(place, layout, facts)
    if found is not None:
        return found
    shutil.rmtree(place, ignore_errors=True)  # a damaged entry
    with suppress(OSError), atomic_folder(place) as work:  # the disk is full, or another process was faster
        _fill_or_refuse(work, layout, fill)
    return _load_entry(place, layout, facts) or _fill_memory(layout, fill)


def _fill_or_refuse(work: Path, layout: RowLayout, fill: Fill) -> None:
    """Write an entry. Raises: OSError; ResourceError if the disk is full after MOST_IN_MEMORY_BYTES."""
    try:
        _fill_folder(work, layout, fill)
    except OSError as error:
        written = sum(file.stat().st_size for file in work.iterdir())
        if error.errno not in FULL or written <= MOST_IN_MEMORY_BYTES:
            raise
        what = f"no room for the encoded rows in {work.parent}: {os.strerror(error.errno)} after {bytes_text(written)}"
        how = "free some space, name another cache folder with TUNEKIT_CACHE, or write streaming: true for this source"
        raise ResourceError(what, how) from error


def _fill_memory(layout: RowLayout, fill: Fill) -> tuple[TokenStore, SourceFacts]:
    streams = memory_streams(layout)
    facts = fill(StoreWriter(layout, streams))
    return store_from_memory(layout, streams), facts


def _fill_folder(work: Path, layout: RowLayout, fill: Fill) -> None:
    with ExitStack() as stack:
        writer = StoreWriter(layout, [stack.enter_context((work / name).open("wb")) for name in files_of(layout)])
        facts = fill(writer)
    meta = {"sha256": writer.hashes(), "facts": facts}
    (work / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _load_entry(place: Path, layout: RowLayout, names: Sequence[str]) -> tuple[TokenStore, SourceFacts] | None:
    """The entry; None if another user wrote it, if a file differs from its stored checksum, or if one of the facts
    `names` is missing."""
    try:
        if not all(map(is_own, (place, *place.iterdir()))):
            return None
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        if any(content_hash(place / name) != meta["sha256"][name] for name in files_of(layout)):
            return None
        facts: SourceFacts = meta["facts"]
        return map_store(place, layout), {name: facts[name] for name in names or facts}
    except (OSError, ValueError, KeyError, TypeError):
        return None
