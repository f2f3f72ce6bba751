"""Random order without state: each permutation or draw depends only on a seed and on names such as the epoch.

The results are the same on every machine and with every version of numpy, because only numpy's raw Philox stream is
used.
"""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def draw_raw(count: int, *parts: int | str) -> NDArray[np.uint64]:
    """`count` random 64-bit numbers. They depend only on `parts`: the seed and the names that identify the draw."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
    return np.asarray(generator.random_raw(count), dtype=np.uint64)  # (count,)


def permutation(count: int, *parts: int | str) -> Indices:
    """The numbers 0 .. count-1 in random order. It depends only on `parts`: the seed and the names of the draw."""
    return np.argsort(draw_raw(count, *parts), kind="stable").astype(np.int64)  # (count,)


@dataclass(frozen=True)
class Share:
    """The rows of one source: start .. stop-1. An epoch has floor(weight) copies of each row, and one more copy of
    some randomly drawn rows: with weight 2.3, of 30 % of the rows.
    """

    start: int
    stop: int
    weight: float = 1.0


def epoch_rows(shares: tuple[Share, ...], *, seed: int, epoch: int, shuffle: bool) -> Indices:
    """Row indices of one epoch in training order. Without shuffling: source by source, in file order."""
    parts: list[Indices] = []
    for number, share in enumerate(shares):
        rows = np.arange(share.start, share.stop, dtype=np.int64)  # (rows of the source,)
        copies = int(share.weight)
        drawn = int((share.weight - copies) * len(rows) + 0.5)
        parts += [rows] * copies
        if drawn:
            chosen = permutation(len(rows), "draw", seed, epoch, number)[:drawn]  # (rest,)
            parts.append(rows[np.sort(chosen)])
    joined = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)  # (rows of the epoch,)
    return joined[permutation(len(joined), "order", seed, epoch)] if shuffle else joined


def without_repeats(order: Sequence[int], hashes: Mapping[int, frozenset[int]], size: int) -> list[int]:
    """The rows in an order in which no two rows of a step have a hash in common. A row that does not fit into a step is
    the first candidate of the next one. The order ends with the first step that cannot be filled; rows after it are
    left out. `size`: rows of a step."""
    waiting, chosen = deque(order), list[int]()
    while waiting:
        step, used, later = list[int](), set[int](), list[int]()
        while waiting and len(step) < size:
            row = waiting.popleft()
            if used.isdisjoint(hashes[row]):
                step.append(row)
                used |= hashes[row]
            else:
                later.append(row)
        waiting.extendleft(reversed(later))
        chosen += step
        if len(step) < size:
            break
    return chosen


def by_kind(
    order: Sequence[int], hashes: Mapping[int, frozenset[int]], size: int, kinds: Sequence[int], *, shuffle: bool
) -> list[int]:
    """As `without_repeats`, with rows of one kind in each step. `kinds`: the kind of each row. The steps of all kinds
    are spread evenly over the order, or come kind by kind without shuffling. Only the last step may have fewer rows;
    other rows that fill no step of their kind are left out."""
    rows = {kind: [row for row in order if kinds[row] == kind] for kind in sorted(set(kinds))}
    if len(rows) < 2:
        return without_repeats(order, hashes, size)
    full_steps, partial = list[tuple[float, list[int]]](), list[int]()
    for number, some in enumerate(rows.values()):
        chosen = without_repeats(some, hashes, size)
        steps = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        if steps and len(steps[-1]) < size:
            partial = max(partial, steps.pop(), key=len)
        full_steps += [((place + 0.5) / len(steps) if shuffle else number, step) for place, step in enumerate(steps)]
    return [row for _, step in sorted(full_steps, key=lambda each: each[0]) for row in step] + partial


def held_out(digests: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """(rows,) whether each row is held out. `fraction`: the held-out share of the rows; at least one row.

    Rows are ordered by a seeded hash of their content. Equal rows stay together: all of them are held out, or none.
    """
    if len(digests) == 0:
        return np.zeros(0, dtype=np.bool_)
    key = draw_raw(1, "eval", seed)[0]
    mixed = np.asarray(digests) ^ key  # (rows,)
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    wanted = max(1, int(len(digests) * fraction + 0.5))
    values = np.sort(mixed)  # (rows,)
    limit = values[min(wanted, len(values) - 1)]
    chosen: NDArray[np.bool_] = mixed < limit
    if not chosen.any():
        chosen = mixed == values[0]
    return chosen
