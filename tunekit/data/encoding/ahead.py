"""Rows encoded into the token cache by a child, while this process is still busy with the model's code.

Comes in: the data section and a tokenizer.  Goes out: cache entries, where all goes well.  Next: rows.py finds them.
The child only warms the cache: whatever goes wrong in it is silent, and this process does it itself, with its own
errors.  Where the entries are there already nothing is forked: the look for them is a hash of each source.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunekit.contracts import Tokenizer
from tunekit.data.encoding.cache import can_keep
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.sources import encode_options, is_encoded, load_source
from tunekit.data.reading.shards import machine_memory_bytes, must_stream
from tunekit.data.reading.source import is_hub_name
from tunekit.errors import TunekitError
from tunekit.files.cache_folder import default_cache_folder
from tunekit.machine.forks import Child, fork_child, usable_cores
from tunekit.recipe.data import DataSection, Source


@contextmanager
def encoded_ahead(data: DataSection, tokenizer: Tokenizer | None) -> Iterator[None]:
    """While inside, a child encodes the sources; the end of the block waits for it, an exception kills it."""
    child = None if tokenizer is None or usable_cores() < 2 else _start(data, tokenizer)
    try:
        yield
        if child is not None:
            child.join()
    finally:
        if child is not None:
            child.stop()


def _start(data: DataSection, tokenizer: Tokenizer) -> Child | None:
    """A child at work; None where there is nothing to do for one."""
    folder = default_cache_folder()
    if not can_keep(folder):
        return None
    try:
        options = encode_options(data, tokenizer)
        given = (tokenizer, options)
        sources = [source for source in _encodable(data) if not is_encoded(source, *given, cache_folder=folder)]
    except (TunekitError, OSError):
        return None  # load_rows will say why
    return fork_child(lambda: _encode(sources, tokenizer, options, folder)) if sources else None


def _encodable(data: DataSection) -> list[Source]:
    """The sources that load_rows will encode whole; not those of a hub, whose fetching the user should see."""
    memory_bytes = machine_memory_bytes()
    streamed = any(must_stream(source, memory_bytes) for source in data.train)
    sources = [*(() if streamed else data.train), *(data.eval if isinstance(data.eval, tuple) else ())]
    return [source for source in sources if not is_hub_name(source.path)]


def _encode(sources: list[Source], tokenizer: Tokenizer, options: EncodeOptions, folder: Path) -> None:
    """The child's work. A source with a wrong row is left to the parent, which tells of every one."""
    for source in sources:
        with suppress(TunekitError):
            load_source(source, tokenizer, options, cache_folder=folder, ahead=True)
