"""The real tokens of padded rows, for encoders whose layers skip padding (padding_free.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = 64  # the number of tokens is a multiple of this, because oneDNN compiles its products anew for each number
MIN_WIDTH_BITS = 4  # rows of up to 16 tokens are one group, then those of up to 32, 64 and 128


class RowGroup:
    """Rows that attend in one product, padded to the longest row. `lengths`: the number of tokens in each row.
    `tokens`: (N,) indices of the group's tokens among the real tokens of all rows."""

    def __init__(self, lengths: Sequence[int], tokens: Tensor) -> None:
        self.lengths, self.tokens, self.longest = lengths, tokens, max(lengths)
        self._places: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def bias(self) -> Tensor:
        """(B, 1, 1, T) float32: minus infinity at padding, 0 elsewhere; T is the length of the longest row."""
        real = torch.arange(self.longest)[None] < torch.tensor(self.lengths)[:, None]  # (B, T)
        return torch.zeros(real.shape).masked_fill(~real, -math.inf)[:, None, None]

    def places(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Three index tensors for copies between the tensor of all tokens, flattened to (M * H), and the group's padded
        tensor, flattened to (B * H * T).

        (N * H,): index of each head of the group's tokens among all tokens. (N * H,): its index in the padded tensor.
        (B * H * T,): for each element of the padded tensor, the index among all tokens (0 at padding).
        """
        if heads not in self._places:
            rows = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))  # (N,)
            positions = torch.cat([torch.arange(length) for length in self.lengths])  # (N,)
            of_head = torch.arange(heads)
            places = (self.tokens[:, None] * heads + of_head).flatten()
            padded = ((rows[:, None] * heads + of_head) * self.longest + positions[:, None]).flatten()
            inverse = torch.zeros(len(self.lengths) * heads * self.longest, dtype=torch.int64)
            inverse[padded] = places
            self._places[heads] = places, padded, inverse
        return self._places[heads]


class RealTokens:
    """The real tokens of padded rows. `lengths`: the number of tokens in each row of width `width`."""

    def __init__(self, lengths: Sequence[int], width: int) -> None:
        self.lengths, self.width = tuple(lengths), width

    @cached_property
    def index(self) -> Tensor:
        """(N,) positions of the real tokens in the flattened padded rows (B * T)."""
        return torch.cat([torch.arange(length) + row * self.width for row, length in enumerate(self.lengths)])

    @cached_property
    def filled_index(self) -> Tensor:
        """(M,): `index`, extended with zeros to a multiple of TOKENS. The added entries are copies of the first token.
        Nothing reads the outputs of these copies, so their gradient is zero."""
        return F.pad(self.index, (0, -len(self.index) % TOKENS))

    @cached_property
    def groups(self) -> list[RowGroup]:
        """The rows grouped by length: no row is padded to more than twice its length, except rows with few tokens."""
        rows = torch.split(torch.arange(len(self.index)), list(self.lengths))
        groups: dict[int, list[Tensor]] = {}
        for row in rows:
            groups.setdefault(max(MIN_WIDTH_BITS, (len(row) - 1).bit_length()), []).append(row)
        return [RowGroup([len(row) for row in each], torch.cat(each)) for _, each in sorted(groups.items())]

    def padded(self, hidden: Tensor) -> Tensor:
        """Put values of real tokens (1, M, D) back into padded rows (B, T, D), with zeros at padding."""
        places, width = len(self.lengths) * self.width, hidden.shape[-1]
        real = hidden[0, : len(self.index)]
        padded = hidden.new_zeros(places, width).index_copy(0, self.index.to(hidden.device), real)
        return padded.view(len(self.lengths), self.width, width)


def real_tokens(inputs: Mapping[str, Tensor]) -> RealTokens | None:
    """The real tokens of a batch whose mask has padding only at the end of rows; None if there is no such mask."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.device.type != "cpu":
        return None
    return RealTokens(mask.sum(dim=1).tolist(), mask.shape[1])
