"""Cuts the encoded rows of a source to data.max_length, and counts them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tunekit.contracts import Row, RowKind, RowLayout
from tunekit.data.encoding.outcomes import Dropped, Outcome
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import place_of
from tunekit.errors import DataError

NO_TARGET = "no supervised token"
NO_TARGET_LEFT = "no supervised token after truncation"
TOO_LONG = "longer than max_length"


@dataclass
class SourceCounts:
    """Counts of a source's rows. `dropped`: the number of dropped rows by reason. `longest_tokens`: the length of the
    longest row before truncation."""

    read: int = 0
    kept: int = 0
    longest_tokens: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Encoded(NamedTuple):
    """A row, or a piece of a split row, with its place in the source. Rows of a JSON array can have the same line."""

    row: Row
    line: int
    number: int  # index of the raw row in its source, from 0
    digest: int


def encode_rows(
    outcomes: Iterable[Outcome], kind: RowKind, *, name: str, problems: Problems, counts: SourceCounts
) -> Iterator[Encoded]:
    """The rows that can be trained on. Errors in other rows are added to `problems`, dropped rows to `counts`."""
    for number, (line, outcome) in enumerate(outcomes):
        counts.read += 1
        try:
            if isinstance(outcome, Exception):
                raise outcome
            pieces = _pieces(outcome, kind, counts)
        except Dropped as reason:
            counts.dropped[str(reason)] += 1
            continue
        except DataError as error:
            problems.add_error(*place_of(name, line), error)
            continue
        counts.kept += 1
        for piece in pieces:
            yield Encoded(piece, line, number, digest_of(piece, kind.layout))


def _pieces(rows: Sequence[Row], kind: RowKind, counts: SourceCounts) -> list[Row]:
    """The pieces of one example's rows that can be trained on. Raises: Dropped if there are no such pieces."""
    pieces, reasons = list[Row](), list[Dropped]()
    for row in rows:
        try:
            pieces += cut_row(row, kind, counts)
        except Dropped as reason:
            reasons.append(reason)
    if not pieces:
        raise reasons[-1]
    counts.truncated += bool(reasons)
    return pieces


def cut_row(row: Row, kind: RowKind, counts: SourceCounts) -> list[Row]:
    """The pieces of a row. A row that is too long is truncated or split, depending on data.excess_length.

    Raises: Dropped with the reason; DataError for a row that is too long, if excess_length is error.
    """
    if row.supervised == 0:
        raise Dropped(NO_TARGET)
    options = kind.options
    length, most = kind.layout.length(row.sizes), options.max_length
    counts.longest_tokens = max(counts.longest_tokens, length)
    if length <= most:
        return [row]
    if options.excess_length == "error":
        how = "raise data.max_length, or set data.excess_length: drop|truncate|split"
        raise DataError(f"the row has {length} tokens{kind.room}, but data.max_length is {most}", how)
    if options.excess_length in ("drop", "shrink"):  # its images were made smaller when it was encoded
        raise Dropped(TOO_LONG + kind.room)
    truncates = options.excess_length == "truncate"
    pieces = [kind.cut(row, 0, most)] if truncates else kind.pieces(row, most)
    pieces = [piece for piece in pieces if piece.supervised]
    if not pieces:
        raise Dropped(NO_TARGET_LEFT)
    counts.truncated += truncates
    return pieces


def digest_of(row: Row, layout: RowLayout) -> int:
    """A 64-bit hash of a row's ids and its other identifying parts. Equal rows have equal digests in all files."""
    digest = hashlib.blake2b(digest_size=8)
    for part in layout.token_parts:
        digest.update(np.ascontiguousarray(row.parts[part], dtype="<i4").tobytes())
    for part in layout.identity:
        digest.update(np.ascontiguousarray(row.parts[part], dtype=layout.parts[part]).tobytes())
    return int.from_bytes(digest.digest(), "little")
