"""Boundaries of the documents in packed rows, computed once per batch."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import add

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Lengths of the documents of each row, in order; a row's lengths sum to T. Padding is a separate document.

    `shared`: the length of each document's shared prefix, such as a prompt with several answers. The prefix is computed
    in the nearest earlier document that has no shared prefix itself. Empty if no document shares a prefix.
    `masked`: virtual tokens come before the documents, so transformers' own mask keeps the documents apart.
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
        """Tokens of the longest document, including its shared prefix."""
        return max(length for row in range(len(self.rows)) for length in self.key_lengths(row))

    def key_lengths(self, row: int) -> tuple[int, ...]:
        """Number of keys of each document of a row: the tokens of its shared prefix plus its own tokens."""
        return tuple(map(add, self.shared[row], self.rows[row])) if self.shared else self.rows[row]

    def key_indices(self, row: int) -> Tensor:
        """(U,) indices in the row: the keys of each document, one document after the other. A shared prefix occurs once
        for each document that uses the prefix."""
        indices, start, first = list[Tensor](), 0, 0
        for length, shared in zip(self.rows[row], self.shared[row], strict=True):
            first = first if shared else start
            indices += [torch.arange(first, first + shared), torch.arange(start, start + length)]
            start += length
        return torch.cat(indices)

    def boundaries(self) -> list[int]:
        """Start of each document in the flattened (B * T) tokens, then the end of the last document."""
        return [0, *accumulate(length for row in self.rows for length in row)]

    def key_boundaries(self) -> list[int]:
        """Start of each document's keys in the flattened keys, then the end of the last document's keys."""
        return [0, *accumulate(length for row in range(len(self.rows)) for length in self.key_lengths(row))]


def find_segments(position_ids: Tensor, *, masked: bool = False) -> Segments:
    """Find the documents of each row from the positions. A document ends where the next position is not one higher. A
    document that starts at position P > 0 shares the first P tokens of the last document that started at 0.

    Shapes: position_ids (B, T), on the host, because their values are read.
    """
    rows, shared = [], []
    for positions in position_ids.numpy():
        starts = [0, *((positions[1:] != positions[:-1] + 1).nonzero()[0] + 1).tolist(), len(positions)]
        rows.append(tuple(stop - start for start, stop in pairwise(starts)))
        shared.append((0, *positions[starts[1:-1]].tolist()))
    return Segments(tuple(rows), tuple(shared) if any(map(any, shared)) else (), masked)
