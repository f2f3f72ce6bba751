"""Keys and values that stand before those of every layer's tokens, and what a base makes of a text as such.

Inside one attention module the learned keys and values are what its cache seems to hold: the module's own code joins
them to its own, so that scaling, grouped heads, soft caps and relative biases stay its business. No cache of the model
knows of them: they work with and without one, and in a recomputed layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunekit.errors import ModelError
from tunekit.model.attention.documents import as_added
from tunekit.model.attention.self_attention import (
    CACHE_NAMES,
    KEY,
    MASK_NAMES,
    SelfAttention,
    decoder,
    no_way_in,
    parameter_of,
    parameters_of,
)
from tunekit.model.call import current_call
from tunekit.model.families.structure import training_mode

if TYPE_CHECKING:
    from transformers import Cache

KeysAndValues = Callable[[int], tuple[Tensor, Tensor]]  # layer -> (H, P, D) keys and values
MaskCache = dict[int | None, tuple[tuple[object, ...], Tensor | None]]  # by window: the origin of the last one, and it
Hooked = tuple[tuple[object, ...], dict[str, Any]]


def enter(
    net: nn.Module, attentions: list[SelfAttention], length: int, keys_values: KeysAndValues
) -> list[RemovableHandle]:
    """Make every layer see `length` keys and values before its own, at the positions 0 to `length` - 1.

    The tokens' own positions then begin at `length`. Returns the hooks; `remove()` takes one out again.
    """
    masks: MaskCache = {}
    entries = [_Entry(attention, length, keys_values, masks) for attention in attentions]
    handles = [entry.attention.module.register_forward_pre_hook(entry, with_kwargs=True) for entry in entries]
    return [*handles, *_shift_positions(net, attentions, length)]


def _same(ones: tuple[object, ...], others: tuple[object, ...]) -> bool:
    """Whether masks made of these would be the same: tensors are compared as objects."""
    pairs = zip(ones, others, strict=True)
    return all(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in pairs)


class _Entry:
    """The hook of one attention module: an earlier past, and a mask that shows it."""

    def __init__(self, attention: SelfAttention, length: int, keys_values: KeysAndValues, masks: MaskCache) -> None:
        self.attention, self.length, self.keys_values, self.masks = attention, length, keys_values, masks
        self.names = parameters_of(attention.module)
        self.cache_name = parameter_of(attention.module, CACHE_NAMES)
        self.mask_name = parameter_of(attention.module, MASK_NAMES)

    def __call__(self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Hooked | None:
        if current_call().bypassed:
            return None
        named = dict(zip(self.names, positional, strict=False)) | named
        cache, hidden = named.get(self.cache_name or ""), named["hidden_states"]
        past = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder's pair of caches
        named[self.cache_name or ""] = EarlierPast(past, self.attention, *self.keys_values(self.attention.layer))
        if self.mask_name is not None:
            seen = int(past.get_seq_length(self.attention.layer)) if past is not None else 0
            own, positions = named.get(self.mask_name), named.get("position_ids")
            inference = torch.is_inference_mode_enabled()  # no backward pass takes what is made in it
            made_of = (own, positions, tuple(hidden.shape[:2]), seen, hidden.dtype, hidden.device, inference)
            window = self.attention.window
            if window not in self.masks or not _same(self.masks[window][0], made_of):
                self.masks[window] = made_of, self._mask(own, past, seen, hidden, positions)
            named[self.mask_name] = self.masks[window][1]
        return (), named

    def _mask(self, mask: object, past: Cache | None, seen: int, hidden: Tensor, positions: object) -> Tensor | None:
        """The layer's mask with `length` columns before its own; None where all is seen anyway."""
        queries = hidden.shape[1]
        if mask is None:
            implementation = str(getattr(getattr(self.attention.module, "config", None), "_attn_implementation", ""))
            windowed = self.attention.window is not None and seen + queries + self.length > self.attention.window
            if implementation.startswith("flash") or (queries == 1 and not windowed):
                return None  # every key is seen, or those kernels align causality with the last key
            keys, first = past.get_mask_sizes(queries, self.attention.layer) if past is not None else (queries, 0)
            mask = _causal_mask(queries, keys, seen - first, self.attention.window, hidden.device)
        if not isinstance(mask, Tensor):
            raise ModelError(f"a prefix cannot extend masks of the kind {type(mask).__name__}", key="model.attention")
        if mask.dim() == 2:  # of tokens, which flash kernels take
            return torch.cat([mask.new_ones(mask.shape[0], self.length), mask], dim=1)
        visible = self._visible(positions, queries, seen, mask.device)
        rows = max(mask.shape[0], visible.shape[0])
        # Booleans would become one such in each layer.
        parts = [as_added(part, hidden.dtype) for part in (visible, mask)]
        return torch.cat([part.expand(rows, mask.shape[1], queries, part.shape[-1]) for part in parts], dim=-1)

    def _visible(self, positions: object, queries: int, seen: int, device: torch.device) -> Tensor:
        """(1 or B, 1, T, P) bool: which of the earlier keys each query sees; in a window, those it still reaches."""
        if self.attention.window is None:
            return torch.ones(1, 1, queries, self.length, dtype=torch.bool, device=device)
        if not isinstance(positions, Tensor):  # without them, padding on the left takes part in the distance
            positions = torch.arange(queries, device=device)[None] + seen + self.length
        return positions[:, None, :, None] - torch.arange(self.length, device=device) < self.attention.window


def _causal_mask(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """(1, 1, T, K) bool: query i sees the keys up to `offset` + i, in a window only the last ones."""
    query = torch.arange(queries, device=device)[:, None] + offset
    key = torch.arange(keys, device=device)[None]
    visible = key <= query
    if window is not None:
        visible = visible & (query - key < window)
    return visible[None, None]


class EarlierPast:
    """What an attention module takes for its cache: the real one, if there is one, and P keys and values before it."""

    def __init__(self, past: Cache | None, attention: SelfAttention, keys: Tensor, values: Tensor) -> None:
        self._past, self._attention, self._keys, self._values = past, attention, keys, values

    def update(self, keys: Tensor, values: Tensor, *more: object, **named: object) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, H, T, D) in the real cache; return all of them, the learned ones first."""
        for own, learned in ((keys, self._keys), (values, self._values)):
            if own.shape[1] != learned.shape[0] or own.shape[3] != learned.shape[2]:
                heads, width = self._attention.heads, self._attention.width
                what = f"{self._attention.name} has {own.shape[1]} heads of {own.shape[3]}, not {heads} of {width}"
                raise ModelError(what, "choose another adapter.method", key=KEY)
        if self._past is not None:
            keys, values = self._past.update(keys, values, *more, **named)
        return _joined(self._keys, keys), _joined(self._values, values)

    def get_seq_length(self, *layer: int) -> int:
        """Tokens before the new ones, the learned ones included."""
        seen = self._past.get_seq_length(self._attention.layer) if self._past is not None else 0
        return int(seen) + int(self._keys.shape[1])


@torch.no_grad()
def keys_and_values(net: nn.Module, attentions: list[SelfAttention], ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What every layer of the plain base makes of these ids (1, T): keys and values (H, T, D), float32 on the CPU."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def record(attention: SelfAttention) -> Callable[..., Hooked]:
        names, cache = parameters_of(attention.module), parameter_of(attention.module, CACHE_NAMES)

        def give(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Hooked:
            recorder = {cache or "": _RecordingCache(found, attention.layer)}
            return (), dict(zip(names, positional, strict=False)) | named | recorder

        return give

    outer = decoder(net)
    handles = [each.module.register_forward_pre_hook(record(each), with_kwargs=True) for each in attentions]
    try:
        with training_mode(net, False):
            outer(input_ids=ids.to(next(net.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [found[attention.layer] for attention in attentions]


class _RecordingCache:
    """An empty cache that notes what it is given."""

    def __init__(self, found: dict[int, tuple[Tensor, Tensor]], layer: int) -> None:
        self.found, self.layer = found, layer

    def update(self, keys: Tensor, values: Tensor, *more: object, **named: object) -> tuple[Tensor, Tensor]:
        """Note keys and values (1, H, T, D)."""
        self.found[self.layer] = keys[0].float().cpu(), values[0].float().cpu()
        return keys, values

    def get_seq_length(self, *layer: int) -> int:
        """No token before these."""
        return 0


def _joined(learned: Tensor, own: Tensor) -> Tensor:
    """(H, P, D) and (B, H, T, D) -> (B, H, P + T, D)."""
    return torch.cat([learned.to(own.dtype).expand(own.shape[0], *learned.shape), own], dim=2)


def _shift_positions(net: nn.Module, attentions: list[SelfAttention], length: int) -> list[RemovableHandle]:
    """A hook that adds `length` to the positions of the tokens, wherever this decoder makes them.

    Raises: ModelError where it makes them in a way of its own.
    """
    outer = decoder(net)
    if "position_ids" in parameters_of(outer):
        return [outer.register_forward_pre_hook(_Shift(outer, length), with_kwargs=True)]
    if any(hasattr(attention.module, "compute_bias") for attention in attentions):
        return []  # positions are distances, which the module takes from what its cache seems to hold
    for name, table in outer.named_children():
        if "position" in name and "position_ids" in parameters_of(table):
            return [table.register_forward_pre_hook(_Shift(table, length), with_kwargs=True)]
    raise no_way_in(decoder(net).config, "takes no position ids")


class _Shift:
    """The hook on the module that is given position ids."""

    def __init__(self, module: nn.Module, length: int) -> None:
        self.names, self.length = parameters_of(module), length

    def __call__(self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Hooked | None:
        if current_call().bypassed:
            return None
        named = dict(zip(self.names, positional, strict=False)) | named
        positions = named.get("position_ids")
        if positions is None:
            tokens = named.get("input_ids")
            tokens = named["inputs_embeds"] if tokens is None else tokens
            cache = next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)
            seen = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + seen  # (1, T)
        named["position_ids"] = positions + self.length
        return (), named
