"""Trains single rows of an embedding or a head, such as the rows of new tokens. All other rows stay frozen.

The module is wrapped, and the wrapper has one trained row per token id.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import AdapterPart, Slot, Slots, Wrapper
from tunekit.adapters.module_names import base_modules, named_copies, plain_entries
from tunekit.contracts import Modules
from tunekit.model.call import current_call
from tunekit.model.pretrained import input_embedding
from tunekit.model.quantized.weights import layer_kind, weight_of
from tunekit.recipe.bases.section import AdapterSettings

KEY = "trainable_token_indices"
Fault = tuple[str, str]  # the fault, and the advice


class TrainedTokens(Wrapper, AdapterPart):
    """Wraps a module and replaces the rows `ids` of its matrix by trained rows: W'[ids[n]] = rows[n].

    Shapes: rows (N, D) float32, cast to the output's dtype; for an embedding ids (...) -> (..., D), for a head (..., D)
    -> (..., V). Starts as the identity: rows = W[ids]. Weight decay does not apply. No other row gets a gradient, and
    no second matrix is allocated. `owner`: a tied module whose trained rows this module uses, instead of storing its
    own rows.
    """

    rows: nn.Parameter
    ids: Tensor  # (N,), ascending
    order: Tensor  # (N,): the positions of their rows

    def __init__(
        self,
        base: nn.Module,
        module_name: str,
        chosen: TokenRows,
        owner: TrainedTokens | None = None,
        *,
        meta: bool = False,
    ) -> None:
        super().__init__(base)
        self.chosen = chosen
        self.declare(module_name, {} if owner is not None else self.slots(base, chosen), meta=meta)
        if owner is not None:
            self.register_parameter("rows", owner.rows)
        device = torch.device("meta") if meta else None
        ids, order = torch.tensor(chosen.ids).sort()
        self.register_buffer("ids", ids.to(device), persistent=False)
        self.register_buffer("order", order.to(device), persistent=False)
        self.embedding = layer_kind(base) == "embedding"
        padding = getattr(base, "padding_idx", None)
        self.padding = chosen.ids.index(padding) if padding in chosen.ids else None  # its row gets no gradient

    @classmethod
    def slots(cls, base: nn.Module, chosen: TokenRows) -> Slots:
        """One row per id."""
        width = base.get_parameter("weight").shape[1]
        return {"rows": Slot("token_adapter.trainable_tokens_delta", (len(chosen.ids), width), decays=False)}

    def initialise(self, generator: Generator) -> None:
        weight = self.base_layer.weight.detach()  # (V, D)
        if weight.is_meta:
            self.rows.data.zero_()  # the values are loaded afterwards
        else:
            self.rows.data[self.order] = weight[self.ids.to(weight.device)].float().to(self.rows.device)

    def move(self, device: torch.device) -> None:
        super().move(device)
        self.ids, self.order = self.ids.to(device), self.order.to(device)

    def forward(self, x: Tensor, *inputs: object, **named: object) -> Tensor:
        y: Tensor = self.base_layer(x, *inputs, **named)
        if current_call().bypassed:
            return y
        return self._embed(x, y) if self.embedding else self._project(x, y)

    def _embed(self, x: Tensor, y: Tensor) -> Tensor:
        """Replaces the embeddings of trained ids in y (..., D) by the trained rows."""
        nearest = torch.searchsorted(self.ids, x).clamp(max=len(self.ids) - 1)  # (...)
        trained = F.embedding(self.order[nearest], self.rows.to(y.dtype), self.padding)  # (..., D)
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma multiplies its embeddings
        trained = trained if scale is None else trained * torch.as_tensor(scale).to(trained)
        return torch.where((self.ids[nearest] == x)[..., None], trained, y)

    def _project(self, x: Tensor, y: Tensor) -> Tensor:
        """Replaces the logits of trained ids in y (..., V) by logits that are computed with the trained rows."""
        bias = getattr(self.base_layer, "bias", None)
        rows = self.rows[self.order].to(x.dtype)  # (N, D), in the order of ids
        trained = F.linear(x, rows, None if bias is None else bias[self.ids].to(x.dtype))  # (..., N)
        return y.index_copy(-1, self.ids, trained.to(y.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        """The complete matrix (V, D): the base's matrix with the trained rows."""
        rows = self.rows.detach()[self.order].to(weight)
        return weight.index_copy(0, self.ids.to(weight.device), rows)


def token_slots(net: nn.Module, settings: AdapterSettings) -> dict[str, Slots]:
    """Declares the trained rows of each module, by module name. Modules that use the rows of a tied module are left
    out."""
    places, modules = token_rows(net, settings), base_modules(net)
    return {name: TrainedTokens.slots(modules[name], rows) for name, rows in places.items() if rows.owner is None}


def written_indices(
    settings: AdapterSettings, tokens: Mapping[str, TrainedTokens]
) -> list[int] | dict[str, list[int]] | None:
    """The value of PEFT's field trainable_token_indices: the ids in the order of their rows. If the settings name
    modules, it maps full module names to ids."""
    indices = getattr(settings, KEY)
    if not indices:
        return None
    if not isinstance(indices, Mapping):
        return list(indices)
    return {name: list(part.chosen.ids) for name, part in tokens.items()}


@dataclass(frozen=True)
class TokenRows:
    """The ids of the rows to train in one module. `owner`: the tied module whose trained rows this module uses, if
    any."""

    ids: tuple[int, ...]
    owner: str | None = None


def token_rows(net: nn.Module, settings: AdapterSettings) -> dict[str, TokenRows]:
    """Every module with trained rows, sorted by name.

    Modules that share the input embedding's matrix, such as a tied head, also share its trained rows. As in PEFT, they
    do not share them if the settings list different ids for such a module.
    """
    modules, indices = base_modules(net), getattr(settings, KEY, ())
    named = (
        indices
        if isinstance(indices, Mapping)
        else {name: indices for name in [embedding_name(net, modules)] if indices}
    )
    rows = {name: TokenRows(tuple(ids)) for entry, ids in named.items() for name in named_copies(modules, [entry])}
    embedding = embedding_name(net, modules) if rows else ""
    if embedding in rows:
        partners = [name for name in tied_with(modules, embedding) if name != embedding]
        if all(rows.get(name, rows[embedding]) == rows[embedding] for name in partners):
            rows |= {name: TokenRows(rows[embedding].ids, embedding) for name in partners}
    return dict(sorted(rows.items()))


def embedding_name(net: nn.Module, modules: Modules) -> str:
    """Name of the module that looks up token ids."""
    embedding = input_embedding(net)
    while isinstance(embedding, Wrapper):
        embedding = embedding.base_layer
    return next((name for name, module in modules.items() if module is embedding), "")


def tied_with(modules: Modules, name: str) -> list[str]:
    """The names of all modules that share the matrix of `name`, including `name`."""
    weight = modules[name].weight
    return [other for other, module in modules.items() if getattr(module, "weight", None) is weight]


def wrong_tokens(
    net: nn.Module, settings: AdapterSettings, targets: Sequence[str], copies: Sequence[str]
) -> list[Fault]:
    """Problems with the setting trainable_token_indices: entries that match no module, matrices without one row per
    token, ids that are too large, and rows that are trained twice."""
    modules, indices = base_modules(net), getattr(settings, KEY, ())
    faults: list[Fault] = []
    for entry in indices if isinstance(indices, Mapping) else ():
        if not named_copies(modules, [entry]):
            last = sorted({name.rpartition(".")[2] for name, module in modules.items() if _by_rows(module)})
            similar = difflib.get_close_matches(entry.rpartition(".")[2], last, n=3, cutoff=0.5) or last[:8]
            faults.append(
                (f"'{entry}' matches no module of the base", f"did you mean {' or '.join(map(repr, similar))}?")
            )
    rows = token_rows(net, settings)
    if indices and not isinstance(indices, Mapping) and not rows:
        faults.append(("the token embedding of the base was not found", "name the module: {MODULE: [ids]}"))
    for name, places in rows.items():
        faults += _wrong_module(name, modules, places.ids)
        for used, how in ((targets, "target_modules"), (copies, "modules_to_save")):
            shared = {other for other in tied_with(modules, name) if other in used} if _by_rows(modules[name]) else ()
            for other in sorted(shared):
                other_use = f"'{other}', which shares them" if other != name else "the whole matrix"
                what = f"rows of '{name}' are trained, but {how} also trains {other_use}"
                faults.append((what, f"remove '{other}' from {how}, or remove {KEY}"))
    return faults


def _by_rows(module: nn.Module) -> bool:
    """Whether each row of the module's matrix belongs to one token."""
    weight = weight_of(module)
    return layer_kind(module) in ("embedding", "linear") and weight is not None and weight.kind == "dense"


def _wrong_module(name: str, modules: Modules, ids: Sequence[int]) -> list[Fault]:
    if not _by_rows(modules[name]):
        what = f"'{name}' ({type(modules[name]).__name__}) is not an embedding or a linear layer in full precision"
        return [(what, "name an embedding, or a head")]
    if plain_entries([name], modules) is None:
        return [(f"'{name}' cannot be distinguished from other modules in PEFT's format", "remove it")]
    last = modules[name].get_parameter("weight").shape[0] - 1
    beyond = [number for number in ids if number > last]
    return [(f"'{name}' has no row {beyond[0]}", f"its rows are 0 to {last}")] if beyond else []
