"""Computes the updates B A x of a batch whose rows have different adapters, with one batched product.

The product needs the factors of all adapters next to each other in memory, so an adapter's factors are copied there
when its first rows arrive. If too little memory is left to keep the copies, each forward copies the factors again,
module by module.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunekit.adapters.base import LayerAdapter

NamedLayers = Mapping[str, LayerAdapter[Any]]  # adapter's name -> its layer, all of one module


@dataclass(frozen=True)
class RowSegments:
    """The rows of K adapters in a batch, with N rows per adapter. An adapter with fewer rows repeats its first row.

    `rows` (K N,): the row numbers; None: all rows of the batch in order. `places`: the positions in `rows` that are not
    repetitions.
    """

    rows: Tensor | None
    places: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], count: int, device: torch.device) -> "RowSegments":
        """Builds the RowSegments of a batch of `count` rows. `rows`: for each adapter, the numbers of its rows."""
        longest = max(map(len, rows))
        padded = [
            numbers[place] if place < len(numbers) else numbers[0] for numbers in rows for place in range(longest)
        ]
        places = [longest * which + place for which, numbers in enumerate(rows) for place in range(len(numbers))]
        in_order = padded == list(range(count))
        return cls(None if in_order else torch.tensor(padded, device=device), torch.tensor(places, device=device))


@dataclass(eq=False)
class CopyMemory:
    """The memory that the FactorBanks of all modules use in total, and its limit."""

    limit_bytes: float = math.inf
    used_bytes: int = 0


@dataclass(eq=False)
class FactorBank:
    """Copies of A (K, R, I) and the transposed B (K, R, O) of one module's adapters, in the compute dtype. Lower ranks
    are padded with zeros.

    The copies are valid while the adapters' weights do not change. `forget` drops the copy of one adapter; `keep` drops
    all copies but those of some adapters, and frees memory.
    """

    total: CopyMemory = field(default_factory=CopyMemory)
    names: list[str | None] = field(default_factory=list)
    memory: tuple[Tensor, ...] = ()

    def arrange(self, names: Sequence[str]) -> list[str]:
        """Reorder the names so that as many adapters as possible stay at their present position in the bank."""
        places = {name: self.names.index(name) for name in names if name in self.names[: len(names)]}
        staying = {place: name for name, place in places.items()}
        others = iter([name for name in names if name not in places])
        return [staying.get(place) or next(others) for place in range(len(names))]

    def stack(self, layers: NamedLayers, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Returns the stacked factors of these layers, in this order. Only factors that are not yet at their position
        in the bank are copied."""
        if torch.is_grad_enabled():
            return _stacked(layers, dtype)
        names = list(layers)
        missing = {place: name for place, name in enumerate(names) if self.names[place : place + 1] != [name]}
        if missing:
            factors = {place: _factors(layers[name], dtype) for place, name in missing.items()}
            if not self._reserve(len(names), factors):
                return _stacked(layers, dtype)
            for place, pair in factors.items():
                for memory, factor in zip(self.memory, pair, strict=True):
                    memory[place, : len(factor)] = factor
                    memory[place, len(factor) :] = 0
                self.names[place] = names[place]
        return tuple(memory[: len(names)] for memory in self.memory)

    @property
    def nbytes(self) -> int:
        """The size of the copies."""
        return sum(memory.nbytes for memory in self.memory)

    def forget(self, name: str) -> None:
        """Drop the copy of an adapter whose weights may change."""
        self.names = [None if other == name else other for other in self.names]

    def keep(self, names: Collection[str]) -> None:
        """Drop the copies of all adapters that are not in `names`. The memory shrinks only if at least its last half is
        unused, so that frequent changes of adapters cause few allocations."""
        self.names = [name if name in names else None for name in self.names]
        used = max((place for place, name in enumerate(self.names, start=1) if name is not None), default=0)
        if 2 * used <= len(self.names):
            self.names = self.names[:used]
            self._replace(tuple(memory[:used].clone() for memory in self.memory) if used else ())

    def _reserve(self, count: int, factors: Mapping[int, tuple[Tensor, ...]]) -> bool:
        """Make room for `count` adapters with the ranks of these factors; returns whether the memory allows it."""
        pair = next(iter(factors.values()))
        rank, size = max(len(a) for a, _ in factors.values()), len(self.names)
        old = self.memory if self.memory and self.memory[0].dtype == pair[0].dtype else ()
        if old and old[0].shape[1] >= rank and size >= count:
            return True
        rank = max(rank, old[0].shape[1] if old else 0)
        row_bytes = sum(rank * factor.shape[1] * factor.itemsize for factor in pair)
        places = (self.total.limit_bytes - self.total.used_bytes + self.nbytes) // row_bytes
        if places < max(count, len(old[0]) if old else 0):
            return False
        size = int(min(max(count, 2 * size if old and size < count else size), places))
        memories = tuple(factor.new_zeros(size, rank, factor.shape[1]) for factor in pair)
        for memory, part in zip(memories, old, strict=bool(old)):
            memory[: len(part), : part.shape[1]] = part
        self._replace(memories)
        self.names = [*(self.names if old else []), *[None] * size][:size]
        return True

    def _replace(self, memory: tuple[Tensor, ...]) -> None:
        self.total.used_bytes -= self.nbytes
        self.memory = memory
        self.total.used_bytes += self.nbytes


def _factors(layer: LayerAdapter[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (R, I) and the transposed B (R, O)."""
    a, b = layer.thin_factors()
    return a.to(dtype), b.to(dtype).t()


def _stacked(layers: NamedLayers, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies and stacks the factors of these layers. The copies pass gradients to the factors."""
    pairs = [_factors(layer, dtype) for layer in layers.values()]
    rank = max(len(a) for a, _ in pairs)
    padded = [[F.pad(factor, (0, 0, 0, rank - len(factor))) for factor in pair] for pair in pairs]
    return tuple(torch.stack(side) for side in zip(*padded, strict=True))


def add_updates(y: Tensor, x: Tensor, factors: Sequence[Tensor], segments: RowSegments) -> None:
    """Add the update of each adapter to its rows of y.

    Shapes: x (B, T, I); y (B, T, O); factors (K, R, I) and (K, R, O).
    """
    a, b = factors
    parts = x if segments.rows is None else x.index_select(0, segments.rows)  # (K N, T, I)
    low = torch.bmm(parts.reshape(len(a), -1, x.shape[-1]), a.transpose(1, 2))  # (K, N T, R)
    if segments.rows is None and y.is_contiguous() and y.dtype == x.dtype:
        y.view(len(a), -1, y.shape[-1]).baddbmm_(low, b)
        return
    update = torch.bmm(low, b).view(len(parts), *y.shape[1:]).index_select(0, segments.places)
    rows = torch.arange(len(y), device=y.device) if segments.rows is None else segments.rows[segments.places]
    y.index_add_(0, rows, update.to(y.dtype))
