"""Where the documents of packed rows begin and end, found once for each batch.

Comes in: position ids on the host.  Goes out: `Segments`, which travel in the Call.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Segments:
    """Lengths of the documents of each row, in order; a row's lengths sum to T. Padding is a document of its own.

    `masked`: transformers' own mask keeps them apart, since virtual tokens stand before them.
    """

    rows: tuple[tuple[int, ...], ...]
    masked: bool = False

    @property
    def single(self) -> bool:
        """Whether every row is one document."""
        return all(len(row) == 1 for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(length for row in self.rows for length in row)

    def boundaries(self) -> list[int]:
        """Where documents begin in the flattened (B * T) tokens, and the end."""
        ends = [0]
        for row in self.rows:
            for length in row:
                ends.append(ends[-1] + length)
        return ends


def find_segments(position_ids: torch.Tensor, *, masked: bool = False) -> Segments:
    """Documents end where a position does not follow the one before it.

    Shapes: position_ids (B, T), on the host: they are read.
    """
    rows = []
    for positions in position_ids.numpy():
        starts = [0, *((positions[1:] != positions[:-1] + 1).nonzero()[0] + 1).tolist(), len(positions)]
        rows.append(tuple(stop - start for start, stop in pairwise(starts)))
    return Segments(tuple(rows), masked)
