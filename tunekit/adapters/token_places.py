"""`trainable_token_indices`: which rows of which embeddings and heads are trained one by one.

Comes in: the base and settings.  Goes out: module name -> TokenRows, or what is wrong.  Next: token_rows.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tunekit.adapters.base import Wrapper
from tunekit.adapters.copied_places import named_copies, plain_entries
from tunekit.adapters.module_names import base_modules
from tunekit.model.quantized.weights import layer_kind, weight_of

KEY = "trainable_token_indices"
Wrong = tuple[str, str]  # what, and how to mend it


@dataclass(frozen=True)
class TokenRows:
    """Rows `ids` of one module's matrix; `owner` is the module whose trained rows these are, where it is another."""

    ids: tuple[int, ...]
    owner: str | None = None


def token_rows(net: nn.Module, settings: Any) -> dict[str, TokenRows]:
    """Every module of which rows are trained, sorted by name.

    What shares the input embedding's matrix, such as a tied head, shares its trained rows too, unless the settings
    give it others: as PEFT has it.
    """
    modules, asked = base_modules(net), getattr(settings, KEY, ())
    named = asked if isinstance(asked, Mapping) else {name: asked for name in [_embedding_name(net, modules)] if asked}
    rows = {name: TokenRows(tuple(ids)) for entry, ids in named.items() for name in named_copies(modules, [entry])}
    embedding = _embedding_name(net, modules) if rows else ""
    if embedding in rows:
        partners = [name for name in tied_with(modules, embedding) if name != embedding]
        if all(rows.get(name, rows[embedding]) == rows[embedding] for name in partners):
            rows |= {name: TokenRows(rows[embedding].ids, embedding) for name in partners}
    return dict(sorted(rows.items()))


def _embedding_name(net: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """Name of the module that token ids are looked up in."""
    find: Any = getattr(net, "get_input_embeddings", None)
    wanted = None if find is None else find()
    while isinstance(wanted, Wrapper):
        wanted = wanted.base_layer
    return next((name for name, module in modules.items() if module is wanted), "")


def tied_with(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """Modules whose matrix is the one of `name`, itself among them."""
    weight = modules[name].weight
    return [other for other, module in modules.items() if getattr(module, "weight", None) is weight]


def wrong_tokens(net: nn.Module, settings: Any, targets: Sequence[str], copies: Sequence[str]) -> list[Wrong]:
    """Entries that match nothing, matrices that cannot be trained by rows, ids beyond them, and double use."""
    modules, asked = base_modules(net), getattr(settings, KEY, ())
    wrong: list[Wrong] = []
    for entry in asked if isinstance(asked, Mapping) else ():
        if not named_copies(modules, [entry]):
            last = sorted({name.rpartition(".")[2] for name, module in modules.items() if _by_rows(module)})
            near = difflib.get_close_matches(entry.rpartition(".")[2], last, n=3, cutoff=0.5) or last[:8]
            wrong.append((f"'{entry}' matches no module of the base", f"did you mean {' or '.join(map(repr, near))}?"))
    rows = token_rows(net, settings)
    if asked and not isinstance(asked, Mapping) and not rows:
        wrong.append(("the base has no token embedding of its own", "name the module: {MODULE: [ids]}"))
    for name, places in rows.items():
        wrong += _wrong_module(name, modules, places.ids)
        for used, how in ((targets, "target_modules"), (copies, "modules_to_save")):
            shared = {other for other in tied_with(modules, name) if other in used} if _by_rows(modules[name]) else ()
            for other in sorted(shared):
                what = f"rows of '{name}' are trained and " + (
                    f"'{other}' shares them" if other != name else "all of it"
                )
                wrong.append((f"{what}, which {how} trains too", f"leave it out of {how}, or write no {KEY}"))
    return wrong


def _by_rows(module: nn.Module) -> bool:
    """Whether a row of the module's matrix belongs to one token."""
    weight = weight_of(module)
    return layer_kind(module) in ("embedding", "linear") and weight is not None and weight.kind == "dense"


def _wrong_module(name: str, modules: Mapping[str, nn.Module], ids: Sequence[int]) -> list[Wrong]:
    if not _by_rows(modules[name]):
        kind = type(modules[name]).__name__
        return [
            (f"'{name}' ({kind}) is no embedding or linear layer in full precision", "name an embedding, or a head")
        ]
    if plain_entries([name], modules) is None:
        return [(f"'{name}' cannot be told from other modules in PEFT's format", "leave it out")]
    last = modules[name].get_parameter("weight").shape[0] - 1
    beyond = [number for number in ids if number > last]
    return [(f"'{name}' has no row {beyond[0]}", f"its rows are 0 to {last}")] if beyond else []
