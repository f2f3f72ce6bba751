"""A key-value cache that is allocated once for many rows. It is a table: each row has one slot, and each token of a row
is in one column.

Every forward writes the new tokens of all rows into the same column, so a row that joins later starts at a later
column. The distance of two columns equals the distance of the tokens' positions, as transformers' windows and masks
require.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import DynamicCache, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer

from tunekit.model.attention.self_attention import CACHE_NAMES
from tunekit.model.families import text_config
from tunekit.model.families.structure import accepted_names, text_net
from tunekit.model.load import LoadedModel
from tunekit.model.pretrained import config_of

if TYPE_CHECKING:
    from transformers import Cache

STATELESS = ("Dynamic", "Dummy")  # transformers' names of layers that cache something per token, or nothing, begin so


@dataclass
class Columns:
    """The part of the key-value cache that a forward uses. The forward reads the columns `start` to `end` of the slots
    `rows`, and writes from column `end` on. `slots` and `capacity`: the numbers of slots and columns in the cache."""

    slots: int
    capacity: int
    rows: slice = field(default_factory=lambda: slice(None))
    start: int = 0
    end: int = 0


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """The cached keys and values of one layer: two tensors (slots, H, capacity, D), which are allocated once.

    The tensors are initialised to zero, because attention multiplies masked columns by a probability of 0 (0 * NaN
    would be NaN).
    """

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self.columns = columns
        self.memory: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *others: object, **named: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values. Returns the keys and values of all columns that the forward reads or writes.
        Shapes: (B, H, T, D) -> (B, H, columns, D)."""
        self.allocate((key_states, value_states))
        columns, count = self.columns, key_states.shape[-2]
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            # This raises an error beyond the end of the memory; a slice would silently drop tokens.
            memory[columns.rows].narrow(2, columns.end, count).copy_(states)
        self.keys, self.values = (
            memory[columns.rows, :, columns.start : columns.end + count] for memory in self.memory
        )
        return self.keys, self.values

    def allocate(self, like: Sequence[Tensor]) -> None:
        """Allocate the cache of this layer, once. `like`: keys and values (B, H, T, D) with the same heads and
        widths."""
        if not self.memory:
            self.device, self.is_initialized = like[0].device, True
            slots, capacity = self.columns.slots, self.columns.capacity
            self.memory = tuple(part.new_zeros(slots, part.shape[1], capacity, part.shape[3]) for part in like)
            self.keys, self.values = self.memory  # Mllama's code reads them before the first update

    def get_seq_length(self) -> int:
        """The number of columns that a forward reads, before the columns that it writes."""
        return self.columns.end - self.columns.start


class SlotMemory:
    """The key-value cache of all layers. `cache`: the object of transformers through which the net uses it."""

    def __init__(self, model: LoadedModel, columns: Columns) -> None:
        self.columns = columns
        self.cache: Cache = DynamicCache(config=config_of(model.net))
        self.layers = [SlotLayer(columns) for _ in self.cache.layers]
        self.cache.layers = self.layers

    @property
    def nbytes(self) -> int:
        """The bytes of allocated memory."""
        return sum(memory.nbytes for layer in self.layers for memory in layer.memory)

    def read(self, row: int, start: int, end: int) -> list[tuple[Tensor, ...]]:
        """Copies of a row's keys and values (1, H, T, D) in the columns `start` to `end`, for each layer."""
        parts = (layer.memory for layer in self.layers)
        return [tuple(part[row : row + 1, :, start:end].clone() for part in memory) for memory in parts]

    def put(self, states: Sequence[Sequence[Tensor]], row: int, start: int) -> None:
        """Write the keys and values (1, H, T, D) of each layer into the slot `row`, from column `start` on."""
        for layer, parts in zip(self.layers, states, strict=True):
            if parts:  # a layer that uses the keys and values of another layer has none
                layer.allocate(parts)
                for memory, part in zip(layer.memory, parts, strict=True):
                    memory[row : row + 1, :, start : start + part.shape[2]] = part

    def copy(self, row: int, end: int, source: SlotMemory, source_row: int, source_end: int, tokens: int) -> None:
        """Copy the `tokens` columns of `source` that end at column `source_end` of its slot `source_row`. In this cache
        they end at column `end` of the slot `row`."""
        for layer, other in zip(self.layers, source.layers, strict=True):
            if other.memory:
                layer.allocate(other.memory)
            for memory, states in zip(layer.memory, other.memory, strict=True):
                memory[row, :, end - tokens : end] = states[source_row, :, source_end - tokens : source_end]

    def shift(self, rows: int, start: int, columns: int) -> None:
        """Move the first `rows` rows, from column `start` on, to the right by `columns`, or to the left if negative."""
        end = self.columns.end
        for layer in self.layers:
            for memory in layer.memory:
                memory[:rows, :, start + columns : end + columns] = memory[:rows, :, start:end].clone()
        self.columns.end += columns


def shares_slots(model: LoadedModel) -> bool:
    """Whether rows of different lengths can share a key-value cache. Every layer must cache keys and values per token,
    and the net must accept a mask. This excludes bases with an encoder or a recurrent state."""
    if model.family.reads_source or has_recurrent_state(model.net):
        return False
    layers = DynamicCache(config=config_of(model.net)).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    names = accepted_names(text_net(model.net))
    return plain and "attention_mask" in names and not names.isdisjoint(CACHE_NAMES)


def has_recurrent_state(net: nn.Module) -> bool:
    """Whether a layer carries a state from token to token, in its cache or (recurrent_gemma) in a module."""
    layers = DynamicCache(config=config_of(net)).layers
    carried = any(not type(layer).__name__.startswith(STATELESS) for layer in layers)
    return carried or any(hasattr(module, "_setup_cache") for module in net.modules())


def shared_length(model: LoadedModel) -> int | None:
    """The maximum number of tokens of rows that can share a forward; None: no limit. In a longer forward, longrope and
    dynamic rotary embeddings rotate all rows by factors for the longest one."""
    config = text_config(model.net)
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = list[int]()
    for layers in (parameters, *(part for part in parameters.values() if isinstance(part, dict))):
        if layers.get("rope_type") == "longrope":
            limits.append(layers["original_max_position_embeddings"])
        elif layers.get("rope_type") == "dynamic":  # only a shorter forward resets the factors of a longer one
            limits.append(config.max_position_embeddings - 1)
    return min(limits, default=None)
