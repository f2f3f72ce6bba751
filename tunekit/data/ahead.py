"""Rows encoded into the token cache by a child, while this process is still busy with the model's code.

Comes in: the data section and a tokenizer.  Goes out: cache entries, where all goes well.  Next: rows.py finds them.
The child only warms the cache: whatever goes wrong in it is silent, and this process does it itself, with its own
errors.  Where the entries are there already, it costs the fork.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tunekit.artifacts.cache_folder import default_cache_folder
from tunekit.data.cache import can_keep
from tunekit.data.children import fork_child, usable_cores
from tunekit.data.load import encode_options, load_source
from tunekit.data.shards import machine_memory_bytes, must_stream
from tunekit.data.source import is_hub_name
from tunekit.errors import TunekitError
from tunekit.protocols import Tokenizer
from tunekit.recipe.data import DataSection, Source


@contextmanager
def encoded_ahead(data: DataSection, tokenizer: Tokenizer | None) -> Iterator[None]:
    """While inside, a child encodes the sources; the end of the block waits for it, an exception kills it."""
    sources = _encodable(data)
    if tokenizer is None or not sources or usable_cores() < 2 or not can_keep(default_cache_folder()):
        yield
        return
    child = fork_child(lambda: _encode(sources, data, tokenizer))
    try:
        yield
        if child is not None:
            child.join()
    finally:
        if child is not None:
            child.stop()


def _encodable(data: DataSection) -> list[Source]:
    """The sources that load_rows will encode whole; not those of a hub, whose fetching the user should see."""
    memory_bytes = machine_memory_bytes()
    streamed = any(must_stream(source, memory_bytes) for source in data.train)
    sources = [*(() if streamed else data.train), *(data.eval if isinstance(data.eval, tuple) else ())]
    return [source for source in sources if not is_hub_name(source.path)]


def _encode(sources: list[Source], data: DataSection, tokenizer: Tokenizer) -> None:
    """The child's work. A source with a wrong row is left to the parent, which tells of every one."""
    options, folder = encode_options(data), default_cache_folder()
    for source in sources:
        try:
            load_source(source, tokenizer, options, cache_folder=folder, ahead=True)
        except TunekitError:
            continue
