"""Where the documents of packed rows begin and end, found once for each batch."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import add

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Lengths of the documents of each row, in order; a row's lengths sum to T. Padding is a document of its own.

    `shared`: with how many tokens of another document each begins, which are computed there: those of the last one
    before it that shares none, such as a prompt with its first answer. Empty where no document shares any.
    `masked`: transformers' own mask keeps them apart, since virtual tokens stand before them.
    """

    rows: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[int, ...], ...] = ()
    masked: bool = False

    @property
    def single(self) -> bool:
        """Whether every row is one document."""
        return all(len(row) == 1 for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest document, those included that it shares."""
        return max(length for row in range(len(self.rows)) for length in self.seen(row))

    def seen(self, row: int) -> tuple[int, ...]:
        """How many keys each document of a row has: its tokens, after those that it shares."""
        return tuple(map(add, self.shared[row], self.rows[row])) if self.shared else self.rows[row]

    def places(self, row: int) -> Tensor:
        """(T',) where in the row the keys of its documents are, one document after the other."""
        found, start, first = list[Tensor](), 0, 0
        for length, shared in zip(self.rows[row], self.shared[row], strict=True):
            first = first if shared else start
            found += [torch.arange(first, first + shared), torch.arange(start, start + length)]
            start += length
        return torch.cat(found)

    def boundaries(self) -> list[int]:
        """Where documents begin in the flattened (B * T) tokens, and the end."""
        return [0, *accumulate(length for row in self.rows for length in row)]

    def key_boundaries(self) -> list[int]:
        """The same of their keys."""
        return [0, *accumulate(length for row in range(len(self.rows)) for length in self.seen(row))]


def find_segments(position_ids: Tensor, *, masked: bool = False) -> Segments:
    """Documents end where a position does not follow the one before it. One that begins at position P > 0 shares the
    first P tokens of the last one that began at 0.

    Shapes: position_ids (B, T), on the host: they are read.
    """
    rows, shared = [], []
    for positions in position_ids.numpy():
        starts = [0, *((positions[1:] != positions[:-1] + 1).nonzero()[0] + 1).tolist(), len(positions)]
        rows.append(tuple(stop - start for start, stop in pairwise(starts)))
        shared.append((0, *positions[starts[1:-1]].tolist()))
    return Segments(tuple(rows), tuple(shared) if any(map(any, shared)) else (), masked)
