"""Order without state: permutations and draws as a pure function of what they are for.

Comes in: a seed and the parts that name a draw (epoch, source).  Goes out: integer arrays, the same on every machine
and with every version of numpy: only the raw Philox stream is used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def draw_raw(count: int, *parts: int | str) -> NDArray[np.uint64]:
    """`count` random 64-bit numbers named by `parts`."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
    return np.asarray(generator.random_raw(count), dtype=np.uint64)  # (count,)


def permutation(count: int, *parts: int | str) -> Indices:
    """The numbers 0 .. count-1 in an order named by `parts`."""
    return np.argsort(draw_raw(count, *parts), kind="stable").astype(np.int64)  # (count,)


@dataclass(frozen=True)
class Share:
    """Rows start .. stop-1 come from one source of weight w: floor(w) whole copies and a draw of the rest an epoch."""

    start: int
    stop: int
    weight: float = 1.0


def epoch_rows(shares: tuple[Share, ...], *, seed: int, epoch: int, shuffle: bool) -> Indices:
    """Row indices of one epoch in training order. Without shuffling: source by source, in file order."""
    parts: list[Indices] = []
    for number, share in enumerate(shares):
        rows = np.arange(share.start, share.stop, dtype=np.int64)  # (rows of the source,)
        whole = int(share.weight)
        rest = int((share.weight - whole) * len(rows) + 0.5)
        parts += [rows] * whole
        if rest:
            chosen = permutation(len(rows), "draw", seed, epoch, number)[:rest]  # (rest,)
            parts.append(rows[np.sort(chosen)])
    joined = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)  # (rows of the epoch,)
    return joined[permutation(len(joined), "order", seed, epoch)] if shuffle else joined
