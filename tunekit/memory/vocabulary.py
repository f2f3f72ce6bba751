"""The output projection of a streamed base. Its matrix is stored with the streamed layers. It is copied to the device
in parts of the vocabulary, through two slots."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.memory.slots import LayerSlots
from tunekit.memory.streaming import gather_on_host, make_slots
from tunekit.model.families.heads import TextHead

PART_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StreamedHead:
    """A TextHead whose matrix is never completely on the device. It is divided into parts (v, D), and a part of
    `weights` is on the device only while it is used.

    `tables`: token embeddings that share the matrix (tied weights); they stay on the host.
    """

    text: TextHead
    slots: LayerSlots
    weights: tuple[Tensor, ...]
    tables: tuple[nn.Module, ...]

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of all tokens: (N, D) -> (N, V) in float32. Each call copies the whole matrix to the device, so
        use it only for a few positions."""
        return self.text.logits(hidden)

    def each(self, *, backwards: bool = False) -> Iterator[tuple[int, int, Callable[[Tensor], Tensor]]]:
        """For each part of the vocabulary, yields its first token id, its number of token ids, and a function that
        computes their logits, (N, D) -> (N, v) in float32."""
        for first, weight in self._parts(backwards=backwards):
            yield first, len(weight), partial(self._logits_of, weight)

    def output(self, hidden: Tensor) -> Tensor:
        """The projection's output (..., V), computed part by part and without a graph."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise RuntimeError("the gradient of a streamed output projection is computed part by part")
        return torch.cat([F.linear(hidden, weight) for _, weight in self._parts()], dim=-1)

    def _parts(self, *, backwards: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yields each part, with the token id of its first row. A part stays on the device until the next part is
        requested."""
        order = list(range(len(self.weights)))[:: -1 if backwards else 1]
        for number, then in zip(order, [*order[1:], order[-1]], strict=True):
            with self.slots.holding(number, then):
                yield number * len(self.weights[0]), self.weights[number]

    def _logits_of(self, weight: Tensor, hidden: Tensor) -> Tensor:
        return self.text.scaled(F.linear(hidden, weight).float())


def stream_head(text: TextHead, device: torch.device, tier: str) -> StreamedHead:
    """Stream the matrix of a head: copy it to the device part by part. From then on, its module also computes its
    output part by part. On a GPU, token embeddings that are tied to the matrix are looked up on the host."""
    module = text.net.get_submodule(text.name)
    assert isinstance(module.weight, nn.Parameter)
    matrix, modules = module.weight.data, list(text.net.modules())  # (V, D)
    tables = tuple(table for table in modules if isinstance(table, nn.Embedding) and table.weight is module.weight)
    for table in tables:
        table.weight = nn.Parameter(matrix, requires_grad=False)
        if device.type not in ("cpu", "meta"):
            gather_on_host(table, device)
    rows = max(1, PART_BYTES // (matrix.shape[1] * matrix.itemsize))
    # .data: no view keeps the whole matrix alive
    weights = tuple(matrix[start : start + rows].data for start in range(0, len(matrix), rows))
    head = StreamedHead(text, make_slots([[weight] for weight in weights], device, tier=tier), weights, tables)
    shape = matrix.shape
    del matrix
    module.weight.data = torch.full((), torch.nan, dtype=module.weight.dtype, device=device).expand(shape)
    module.forward = head.output
    return head


def head_obstacle(text: TextHead) -> str | None:
    """The reason why an output projection cannot be streamed; None if it can be."""
    module = text.net.get_submodule(text.name)
    if type(module) is not nn.Linear:
        return "the output projection is adapted, trained or packed"
    if module.bias is not None or text.offset_name is not None:
        return "the output projection is not a single matrix without bias"
    return None
