"""Puts rows of several sizes into one tensor: end to end, and padded on the right.

The mask follows from the sizes, never from the id of the padding token.
"""

from collections.abc import Sequence
from operator import add
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = Sequence[Sequence[NDArray[Any]]]


def lay_end_to_end(sequences: Arrays, fill: int, kind: type[np.generic] = np.int64) -> Tensor:
    """(B, T): one line per sequence, with the arrays of the sequence end to end, padded with `fill`."""
    widths = [sum(map(len, arrays)) for arrays in sequences]
    laid = np.full((len(widths), max(widths, default=0)), fill, dtype=kind)  # (B, T)
    for line, arrays, width in zip(laid, sequences, widths, strict=True):
        np.concatenate(arrays, out=line[:width], casting="unsafe")
    return torch.from_numpy(laid)


def positions(sizes: Sequence[Sequence[int]], firsts: Sequence[Sequence[int]] | None = None) -> Tensor:
    """(B, T) int64: each token's position in its part of the sequence, from 0 or from `firsts`. Padding counts from 0.

    `sizes`: for each sequence, the sizes of its parts, such as packed rows. `firsts`: the first position of each part.
    """
    width = max((sum(parts) for parts in sizes), default=0)
    firsts = [[0] * len(parts) for parts in sizes] if firsts is None else firsts
    counted = [
        [*map(np.arange, begin, map(add, begin, parts)), np.arange(width - sum(parts))]
        for begin, parts in zip(firsts, sizes, strict=True)
    ]
    return lay_end_to_end(counted, 0)


def real_positions(widths: Sequence[int]) -> Tensor:
    """(B, T) bool: True for tokens, False for padding. `widths`: the size of each sequence."""
    return torch.arange(max(widths, default=0))[None] < torch.tensor(widths)[:, None]
