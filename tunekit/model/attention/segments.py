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
    in the nearest earlier document without a shared prefix. Empty if no document shares a prefix.
    `masked`: transformers' own mask keeps the documents apart, because virtual tokens come before them.
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
        """Number of keys of each document of a row: its shared prefix and its tokens."""
        return tuple(map(add, self.shared[row], self.rows[row])) if self.shared else self.rows[row]

    def key_indices(self, row: int) -> Tensor:
        """(T',) positions in the row of the documents' keys, one document after the other."""
        indices, start, first = list[Tensor](), 0, 0
        for length, shared in zip(self.rows[row], self.shared[row], strict=True):
            first = first if shared else start
            indices += [torch.arange(first, first + shared), torch.arange(start, start + length)]
            start += length
        return torch.cat(indices)

    def boundaries(self) -> list[int]:
        """Starts of the documents in the flattened (B * T) tokens, and the end."""
        return [0, *accumulate(length for row in self.rows for length in row)]

    def key_boundaries(self) -> list[int]:
        """Starts of the documents' keys, and the end."""
        return [0, *accumulate(length for row in range(len(self.rows)) for length in self.key_lengths(row))]


def find_segments(position_ids: Tensor, *, masked: bool = False) -> Segments:
    """The documents of rows, from their positions. A document ends if the next position is not one higher. A document
    that starts at position P > 0 shares the first P tokens of the last document that started at 0.

    Shapes: position_ids (B, T), on the host, because their values are read.
    """
    rows, shared = [], []
    for positions in position_ids.numpy():
        starts = [0, *((positions[1:] != positions[:-1] + 1).nonzero()[0] + 1).tolist(), len(positions)]
        rows.append(tuple(stop - start for start, stop in pairwise(starts)))
        shared.append((0, *positions[starts[1:-1]].tolist()))
    return Segments(tuple(rows), tuple(shared) if any(map(any, shared)) else (), masked)
