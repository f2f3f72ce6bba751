"""The output projection of a streamed base: its matrix waits where the layers do, and passes through two slots, a part
of the vocabulary at a time.

Comes in: the projection's module, its matrix on the host.  Goes out: HeadParts, and a head that is met part by part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.errors import TunekitError
from tunekit.memory.slots import LayerSlots
from tunekit.memory.streaming import gather_on_host, make_slots
from tunekit.model.families.heads import TextHead

PART_BYTES = 64 * 2**20


@dataclass(frozen=True)
class HeadParts:
    """Rows of the matrix, (v, D) each: `weights` lie in a slot while they are computed with.

    `tables`: token embeddings that were one with the matrix; they stay on the host.
    """

    slots: LayerSlots
    weights: tuple[Tensor, ...]
    tables: tuple[nn.Module, ...] = ()

    def each(self, *, backwards: bool = False) -> Iterator[tuple[int, Tensor]]:
        """The id of its first row, and the part, there until the next one is asked for."""
        numbers = range(len(self.weights))
        order = list(reversed(numbers)) if backwards else list(numbers)
        rows = len(self.weights[0])
        for number, then in zip(order, [*order[1:], order[-1]], strict=True):
            with self.slots.holding(number, then):
                yield number * rows, self.weights[number]


@dataclass(frozen=True)
class StreamedHead:
    """A TextHead whose matrix is not on the device as a whole."""

    text: TextHead
    parts: HeadParts

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) in float32: for a few positions, since all parts are copied for them."""
        return self.text.logits(hidden)

    def each(self, *, backwards: bool = False) -> Iterator[tuple[int, int, Callable[[Tensor], Tensor]]]:
        """The first id of each part, how many it has, and what gives their logits: (N, D) -> (N, v) in float32."""
        for first, weight in self.parts.each(backwards=backwards):
            yield first, len(weight), partial(self._logits_of, weight)

    def _logits_of(self, weight: Tensor, hidden: Tensor) -> Tensor:
        return self.text.scaled(F.linear(hidden, weight).float())


def stream_head(module: nn.Linear, device: torch.device, tier: str, net: nn.Module | None = None) -> HeadParts:
    """Let a projection's matrix pass through slots; the module itself computes part by part from now on.

    `net`: in which token embeddings may be one with the matrix; on a GPU they are then looked up on the host.
    """
    matrix, found = module.weight.data, [] if net is None else list(net.modules())  # (V, D)
    tables = tuple(each for each in found if isinstance(each, nn.Embedding) and each.weight is module.weight)
    for table in tables:
        table.weight = nn.Parameter(matrix, requires_grad=False)
        if device.type not in ("cpu", "meta"):
            gather_on_host(table, device)
    rows = max(1, PART_BYTES // (matrix.shape[1] * matrix.itemsize))
    weights = tuple(matrix[start : start + rows].data for start in range(0, len(matrix), rows))  # no view keeps it
    parts = HeadParts(make_slots([[weight] for weight in weights], device, tier=tier), weights, tables)
    shape = matrix.shape
    del matrix
    module.weight.data = torch.full((), torch.nan, dtype=module.weight.dtype, device=device).expand(shape)
    whole: nn.Module = module

    def computed(hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise TunekitError("a streamed output projection has no gradient as a whole: its parts are gone by then")
        return torch.cat([F.linear(hidden, weight) for _, weight in parts.each()], dim=-1)

    whole.forward = computed
    return parts


def head_obstacle(module: nn.Module, text: TextHead) -> str | None:
    """Why a projection cannot be streamed, or None."""
    if type(module) is not nn.Linear:
        return "the output projection is adapted, trained or packed"
    if module.bias is not None or text.offset_name is not None:
        return "the output projection is more than one plain matrix"
    return None
