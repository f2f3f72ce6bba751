"""Ways to bring rows of several sizes into one tensor: end to end, and padded on the right.

Padding is masked by size, never by id.
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
    """(B, T): the arrays of each sequence one after the other, then `fill`."""
    widths = [sum(map(len, arrays)) for arrays in sequences]
    laid = np.full((len(widths), max(widths, default=0)), fill, dtype=kind)  # (B, T)
    for line, arrays, width in zip(laid, sequences, widths, strict=True):
        np.concatenate(arrays, out=line[:width], casting="unsafe")
    return torch.from_numpy(laid)


def positions(sizes: Sequence[Sequence[int]], firsts: Sequence[Sequence[int]] | None = None) -> Tensor:
    """(B, T) int64: counting from 0, or from `firsts`, in each of a sequence's parts, whose sizes are given, and from 0
    in its padding."""
    width = max((sum(parts) for parts in sizes), default=0)
    firsts = [[0] * len(parts) for parts in sizes] if firsts is None else firsts
    counted = [
        [*map(np.arange, begin, map(add, begin, parts)), np.arange(width - sum(parts))]
        for begin, parts in zip(firsts, sizes, strict=True)
    ]
    return lay_end_to_end(counted, 0)


def real_positions(widths: Sequence[int]) -> Tensor:
    """(B, T) bool: which positions of sequences of these sizes are no padding."""
    return torch.arange(max(widths, default=0))[None] < torch.tensor(widths)[:, None]
