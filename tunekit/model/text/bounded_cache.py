"""A cache of keys and values with memory for a known number of tokens, which is allocated once and never grows."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class BoundedLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer for up to `tokens` tokens of each row.

    transformers' own layer joins the old and the new tensors at every token: that copies the cache each time, and needs
    memory for both. Here `keys` and `values` are views of the first tokens of two fixed tensors (B, H, tokens, D).
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.memory: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *others: object, **named: object
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens. Shapes: (B, H, T, D) -> (B, H, tokens so far, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.memory is None:
            self.memory = self._allocated(key_states), self._allocated(value_states)
        start, count = self.get_seq_length(), key_states.shape[-2]
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory.narrow(2, start, count).copy_(states)  # an error beyond the memory, where a slice would drop tokens
        self._show(start + count)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace the rows by these rows, some of which may occur several times."""
        length, states = self.get_seq_length(), (self.keys, self.values)
        if length:
            selected = []
            for tensor in states:
                memory = self._allocated(tensor, len(indices))
                torch.index_select(tensor, 0, indices, out=memory[:, :, :length])
                selected.append(memory)
            self.memory = selected[0], selected[1]
            self._show(length)

    def _allocated(self, states: Tensor, rows: int | None = None) -> Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch if rows is None else rows, heads, self.tokens, width)

    def _show(self, length: int) -> None:
        assert self.memory is not None
        self.keys, self.values = (memory[:, :, :length] for memory in self.memory)


def bound(cache: Cache, tokens: int) -> Cache:
    """The empty cache, with layers for up to `tokens` tokens."""
    cache.layers = [BoundedLayer(tokens) for _ in cache.layers]
    return cache
