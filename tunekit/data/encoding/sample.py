"""Encodes the first rows of a streamed source, for estimates and for preview."""

from collections import Counter
from pathlib import Path

from tunekit.contracts import RowKind
from tunekit.data.batching.stream import StreamedSource
from tunekit.data.encoding.encode import SourceCounts, encode_rows
from tunekit.data.encoding.notes import counted_note, drawn_notes, filled_columns, format_note
from tunekit.data.encoding.outcomes import SourceEncoder
from tunekit.data.encoding.sources import EncodedSource, encoding_facts
from tunekit.data.encoding.store import StoreWriter, memory_streams, store_from_memory
from tunekit.data.reading.first import format_maker, format_of, single_rows
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.several import empty_files_note
from tunekit.data.reading.shards import first_rows, shard_source
from tunekit.errors import DataError
from tunekit.files.cache_folder import hash_of
from tunekit.recipe.data import Source

SAMPLE_ROWS = 1000


def sample_source(source: Source, number: int, kind: RowKind) -> tuple[StreamedSource, EncodedSource]:
    """A streamed source, and its first rows. If the length of the source is known, counts are scaled to all its rows.

    Raises: DataError if the first rows are wrong.
    """
    sharded = shard_source(source)
    problems, counts = Problems(), SourceCounts()
    rows = first_rows(sharded, SAMPLE_ROWS, problems)
    problems.raise_if_any()
    if not rows:
        raise DataError("the source has no rows", "add rows to it, or name another file", file=source.path)
    format_name, reason = format_of(source, rows[0], kind.example)
    counting = kind.counting()
    streams = memory_streams(kind.layout)
    writer = StoreWriter(kind.layout, streams)
    encoder = SourceEncoder(format_maker(format_name, source.path), counting, source.path)
    outcomes = map(encoder.outcome, single_rows(rows, format_name))
    encoded = encode_rows(outcomes, kind, name=source.path, problems=problems, counts=counts)
    for piece in encoded:
        writer.add(*piece)
    problems.raise_if_any()
    name = Path(source.path).name
    notices = [format_note(name, format_name, reason, filled_columns(rows[0].values))]
    notices += [f"{name}: streamed, shuffled by shard and buffer", *empty_files_note(source.path)]
    notices += drawn_notes(name, source)
    head = f"{name}, first {len(rows):,} rows"
    notices += [counted_note(head, count, what) for what, count in counting.notices.items()]
    fingerprint = hash_of([sharded.content, *encoding_facts(source, kind)])
    store = store_from_memory(kind.layout, streams)
    counts = _scaled(counts, 1.0 if sharded.lines is None else max(sharded.lines / len(rows), 1.0))
    sample = EncodedSource(source, store, name, counts, tuple(notices), fingerprint, sharded.names)
    return StreamedSource(sharded, format_name, number, kind), sample


def _scaled(counts: SourceCounts, scale: float) -> SourceCounts:
    """Counts of the whole source, estimated from the counts of its sample."""
    return SourceCounts(
        read=round(counts.read * scale),
        kept=round(counts.kept * scale),
        truncated=round(counts.truncated * scale),
        dropped=Counter({reason: round(count * scale) for reason, count in counts.dropped.items()}),
    )
