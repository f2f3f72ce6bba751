"""Rows of an embedding, or of a head, trained one by one: new tokens learn, and the rest of the matrix stays.

Comes in: a module of the base and token ids.  Goes out: a wrapper with one trained row per id.  Next: attach.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import Part, Slot, Wrapper
from tunekit.adapters.module_names import base_modules
from tunekit.adapters.token_places import TokenRows, token_rows
from tunekit.model.call import current_call
from tunekit.model.quantized.weights import layer_kind


class TrainedTokens(Wrapper, Part):
    """The module with its rows `ids` replaced by trained ones: W'[ids[n]] = rows[n].

    Shapes: rows (N, D) float32, cast to the output's dtype; of an embedding ids (...) -> (..., D), of a head (..., D)
    -> (..., V).    Starts as the identity: rows = W[ids].    Weight decay spares them.    No other row gets a gradient,
    and no second matrix is made.    Given `owner`, a module tied to this one, its rows are used and none are held.
    """

    rows: nn.Parameter
    ids: Tensor  # (N,), ascending
    order: Tensor  # (N,): where their rows are

    def __init__(
        self, base: nn.Module, place: str, places: TokenRows, owner: TrainedTokens | None = None, *, meta: bool = False
    ) -> None:
        super().__init__(base)
        self.places = places
        self.hold(place, {} if owner is not None else self.slots(base, places), meta=meta)
        if owner is not None:
            self.register_parameter("rows", owner.rows)
        device = torch.device("meta") if meta else None
        ids, order = torch.tensor(places.ids).sort()
        self.register_buffer("ids", ids.to(device), persistent=False)
        self.register_buffer("order", order.to(device), persistent=False)
        self.embedding = layer_kind(base) == "embedding"
        padding = getattr(base, "padding_idx", None)
        self.padding = places.ids.index(padding) if padding in places.ids else None  # its row gets no gradient

    @classmethod
    def slots(cls, base: nn.Module, places: TokenRows) -> dict[str, Slot]:
        """One row per id."""
        width = base.get_parameter("weight").shape[1]
        return {"rows": Slot("token_adapter.trainable_tokens_delta", (len(places.ids), width), decays=False)}

    def initialise(self, generator: Generator) -> None:
        weight = self.base_layer.weight.detach()  # (V, D)
        if weight.is_meta:
            self.rows.data.zero_()  # the values are loaded afterwards
        else:
            self.rows.data[self.order] = weight[self.ids.to(weight.device)].float().to(self.rows.device)

    def move(self, device: torch.device) -> None:
        super().move(device)
        self.ids, self.order = self.ids.to(device), self.order.to(device)

    def forward(self, x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *inputs, **named)
        if current_call().bypassed:
            return y
        return self._looked_up(x, y) if self.embedding else self._projected(x, y)

    def _looked_up(self, x: Tensor, y: Tensor) -> Tensor:
        """y (..., D) with the rows of trained ids in place."""
        near = torch.searchsorted(self.ids, x).clamp(max=len(self.ids) - 1)  # (...)
        own = F.embedding(self.order[near], self.rows.to(y.dtype), self.padding)  # (..., D)
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma multiplies what it looks up
        own = own if scale is None else own * torch.as_tensor(scale).to(own)
        return torch.where((self.ids[near] == x)[..., None], own, y)

    def _projected(self, x: Tensor, y: Tensor) -> Tensor:
        """y (..., V) with the logits of trained ids in place."""
        bias = getattr(self.base_layer, "bias", None)
        rows = self.rows[self.order].to(x.dtype)  # (N, D), in the order of ids
        own = F.linear(x, rows, None if bias is None else bias[self.ids].to(x.dtype))  # (..., N)
        return y.index_copy(-1, self.ids, own.to(y.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        """The whole matrix (V, D) from the base's."""
        rows = self.rows.detach()[self.order].to(weight)
        return weight.index_copy(0, self.ids.to(weight.device), rows)


def token_slots(net: nn.Module, settings: Any) -> dict[str, dict[str, Slot]]:
    """The state of trained rows by module name, without those that share another module's."""
    places, modules = token_rows(net, settings), base_modules(net)
    return {name: TrainedTokens.slots(modules[name], rows) for name, rows in places.items() if rows.owner is None}


def written_indices(settings: Any, tokens: Mapping[str, TrainedTokens]) -> list[int] | dict[str, list[int]] | None:
    """PEFT's field: ids in the order of their rows, by whole module names where the settings name modules."""
    asked = settings.trainable_token_indices
    if not asked:
        return None
    if not isinstance(asked, Mapping):
        return list(asked)
    return {name: list(part.places.ids) for name, part in tokens.items()}
