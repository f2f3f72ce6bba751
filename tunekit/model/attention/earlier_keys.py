"""Puts learned keys and values before the tokens of every layer, and records the keys and values of a text.

An attention module receives the learned keys and values as if they were in its cache, and its own code joins them with
the tokens' keys and values. So scaling, grouped heads, soft caps and relative biases need no code here. The model's own
cache does not contain the learned keys, so the learned keys also work without a cache and in a recomputed layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunekit.errors import ModelError
from tunekit.model.attention.documents import as_bias
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
# window -> the inputs of the last mask, and that mask
MaskCache = dict[int | None, tuple[tuple[object, ...], Tensor | None]]
Hooked = tuple[tuple[object, ...], dict[str, Any]]


def enter(
    net: nn.Module, attentions: list[SelfAttention], length: int, keys_values: KeysAndValues
) -> list[RemovableHandle]:
    """In every layer, put `length` learned keys and values before the keys and values of the tokens.

    The learned keys have the positions 0 to `length` - 1, and the tokens' positions start at `length`. Returns the
    hooks; call `remove()` on all of them to undo the change.
    """
    masks: MaskCache = {}
    entries = [_Entry(attention, length, keys_values, masks) for attention in attentions]
    handles = [entry.attention.module.register_forward_pre_hook(entry, with_kwargs=True) for entry in entries]
    return [*handles, *_shift_positions(net, attentions, length)]


def _same_inputs(ones: tuple[object, ...], others: tuple[object, ...]) -> bool:
    """Whether two masks were made from the same inputs. Tensors are compared by identity."""
    pairs = zip(ones, others, strict=True)
    return all(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in pairs)


class _Entry:
    """The forward pre-hook of one attention module. It adds the learned keys to the cache, and makes them visible in
    the mask."""

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
        past = getattr(cache, "self_attention_cache", cache)  # an encoder-decoder has a pair of caches
        named[self.cache_name or ""] = EarlierPast(past, self.attention, *self.keys_values(self.attention.layer))
        if self.mask_name is not None:
            cached = int(past.get_seq_length(self.attention.layer)) if past is not None else 0
            mask, positions = named.get(self.mask_name), named.get("position_ids")
            inference = torch.is_inference_mode_enabled()  # tensors made in inference mode cannot enter a backward pass
            made_of = (mask, positions, tuple(hidden.shape[:2]), cached, hidden.dtype, hidden.device, inference)
            window = self.attention.window
            if window not in self.masks or not _same_inputs(self.masks[window][0], made_of):
                self.masks[window] = made_of, self._mask(mask, past, cached, hidden, positions)
            named[self.mask_name] = self.masks[window][1]
        return (), named

    def _mask(self, mask: object, past: Cache | None, cached: int, hidden: Tensor, positions: object) -> Tensor | None:
        """The layer's mask with `length` more columns on the left; None if all keys are visible anyway."""
        queries = hidden.shape[1]
        if mask is None:
            implementation = str(getattr(getattr(self.attention.module, "config", None), "_attn_implementation", ""))
            windowed = self.attention.window is not None and cached + queries + self.length > self.attention.window
            if implementation.startswith("flash") or (queries == 1 and not windowed):
                return None  # all keys are visible, or the kernel aligns causality with the last key
            keys, first = past.get_mask_sizes(queries, self.attention.layer) if past is not None else (queries, 0)
            mask = _causal_mask(queries, keys, cached - first, self.attention.window, hidden.device)
        if not isinstance(mask, Tensor):
            what = f"a prefix cannot extend a mask of type {type(mask).__name__}"
            raise ModelError(what, "write model.attention: sdpa", key="model.attention")
        if mask.dim() == 2:  # a mask of tokens, as flash kernels take it
            return torch.cat([mask.new_ones(mask.shape[0], self.length), mask], dim=1)
        visible = self._visible(positions, queries, cached, mask.device)
        rows = max(mask.shape[0], visible.shape[0])
        # Boolean masks would be converted in every layer.
        parts = [as_bias(part, hidden.dtype) for part in (visible, mask)]
        return torch.cat([part.expand(rows, mask.shape[1], queries, part.shape[-1]) for part in parts], dim=-1)

    def _visible(self, positions: object, queries: int, cached: int, device: torch.device) -> Tensor:
        """(1 or B, 1, T, P) bool: which learned keys each query sees: all keys, or only the keys within the window."""
        if self.attention.window is None:
            return torch.ones(1, 1, queries, self.length, dtype=torch.bool, device=device)
        if not isinstance(positions, Tensor):  # without positions, left padding counts as distance
            positions = torch.arange(queries, device=device)[None] + cached + self.length
        return positions[:, None, :, None] - torch.arange(self.length, device=device) < self.attention.window


def _causal_mask(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """(1, 1, T, K) bool: query i sees the keys up to `offset` + i; with a window, only the last `window` of these."""
    query = torch.arange(queries, device=device)[:, None] + offset
    key = torch.arange(keys, device=device)[None]
    visible = key <= query
    if window is not None:
        visible = visible & (query - key < window)
    return visible[None, None]


class EarlierPast:
    """Replaces an attention module's cache: P learned keys and values, followed by the real cache if there is one."""

    def __init__(self, past: Cache | None, attention: SelfAttention, keys: Tensor, values: Tensor) -> None:
        self._past, self._attention, self._keys, self._values = past, attention, keys, values

    def update(self, keys: Tensor, values: Tensor, *more: object, **named: object) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, H, T, D) in the real cache. Returns the learned, cached and new keys and
        values."""
        for tensor, learned in ((keys, self._keys), (values, self._values)):
            if tensor.shape[1] != learned.shape[0] or tensor.shape[3] != learned.shape[2]:
                name, heads, width = self._attention.name, self._attention.heads, self._attention.width
                what = f"{name} has {tensor.shape[1]} heads of width {tensor.shape[3]}, not {heads} of width {width}"
                raise ModelError(what, "choose another adapter.method", key=KEY)
        if self._past is not None:
            keys, values = self._past.update(keys, values, *more, **named)
        return _join(self._keys, keys), _join(self._values, values)

    def get_seq_length(self, *layer: int) -> int:
        """The number of keys before the new tokens, including the learned keys."""
        cached = self._past.get_seq_length(self._attention.layer) if self._past is not None else 0
        return int(cached) + int(self._keys.shape[1])


@torch.no_grad()
def keys_and_values(net: nn.Module, attentions: list[SelfAttention], ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Compute the keys and values (H, T, D) of the text `ids` (1, T) in every layer of a base without adapters. Returns
    them in float32 on the CPU."""
    recorded: dict[int, tuple[Tensor, Tensor]] = {}

    def record(attention: SelfAttention) -> Callable[..., Hooked]:
        names, cache = parameters_of(attention.module), parameter_of(attention.module, CACHE_NAMES)

        def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Hooked:
            recorder = {cache or "": _RecordingCache(recorded, attention.layer)}
            return (), dict(zip(names, positional, strict=False)) | named | recorder

        return hook

    outer = decoder(net)
    handles = [
        attention.module.register_forward_pre_hook(record(attention), with_kwargs=True) for attention in attentions
    ]
    try:
        with training_mode(net, False):
            outer(input_ids=ids.to(next(net.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [recorded[attention.layer] for attention in attentions]


class _RecordingCache:
    """An empty cache that records the keys and values it receives."""

    def __init__(self, recorded: dict[int, tuple[Tensor, Tensor]], layer: int) -> None:
        self.recorded, self.layer = recorded, layer

    def update(self, keys: Tensor, values: Tensor, *more: object, **named: object) -> tuple[Tensor, Tensor]:
        """Record keys and values (1, H, T, D)."""
        self.recorded[self.layer] = keys[0].float().cpu(), values[0].float().cpu()
        return keys, values

    def get_seq_length(self, *layer: int) -> int:
        """Always 0: no token comes before the recorded tokens."""
        return 0


def _join(learned: Tensor, states: Tensor) -> Tensor:
    """Join learned (H, P, D) and new states (B, H, T, D) -> (B, H, P + T, D)."""
    return torch.cat([learned.to(states.dtype).expand(states.shape[0], *learned.shape), states], dim=2)


def _shift_positions(net: nn.Module, attentions: list[SelfAttention], length: int) -> list[RemovableHandle]:
    """Register hooks that add `length` to the positions of the tokens. Returns the hooks: none if the model computes
    positions from the length of its cache.

    Raises: ModelError if the decoder makes positions in an unknown way.
    """
    outer = decoder(net)
    if "position_ids" in parameters_of(outer):
        return [outer.register_forward_pre_hook(_Shift(outer, length), with_kwargs=True)]
    if any(hasattr(attention.module, "compute_bias") for attention in attentions):
        return []  # positions are distances, which the module computes from the length of its cache
    for name, table in outer.named_children():
        if "position" in name and "position_ids" in parameters_of(table):
            return [table.register_forward_pre_hook(_Shift(table, length), with_kwargs=True)]
    raise no_way_in(decoder(net).config, "it takes no position ids")


class _Shift:
    """The hook on the module that receives position ids: it adds `length` to every position."""

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
            cached = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + cached  # (1, T)
        named["position_ids"] = positions + self.length
        return (), named
