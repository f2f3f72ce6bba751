"""scaled_dot_product_attention of a simulated computation, by the kernel that the real device would pick.

Comes in: attention calls on the meta device, where torch itself always takes the kernel that makes all scores.
Goes out: the same call through the real device's kernel, without values.  Next: training/simulation.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend


@contextmanager
def attention_as_on(device: torch.device) -> Iterator[None]:
    """Inside the block attention on the meta device goes as on `device`.

    The function itself is exchanged, because a torch function mode is not active in recomputation.
    """
    original = functional.scaled_dot_product_attention

    def attend(query: Tensor, *inputs: Any, **named: Any) -> Tensor:
        if query.is_meta:
            return _attend(original, device, query, *inputs, **named)
        return original(query, *inputs, **named)

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def _attend(
    original: Any,
    device: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Shapes: query (B, H, T, D), key and value (B, G, S, D) -> (B, H, T, D)."""
    real = (_untouched(tensor, device) for tensor in (query, key, value, attn_mask))
    choose: Any = torch._fused_sdp_choice
    choice = SDPBackend(choose(*real, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa))
    if choice == SDPBackend.MATH:
        return original(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))  # as torch does itself
    kernels: Any = torch.ops.aten
    outputs: tuple[Tensor, ...]
    if choice == SDPBackend.FLASH_ATTENTION and device.type == "cpu":
        outputs = kernels._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )
    elif choice == SDPBackend.FLASH_ATTENTION:
        outputs = kernels._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
    elif choice == SDPBackend.EFFICIENT_ATTENTION:
        outputs = kernels._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout_p, is_causal, scale=scale
        )
    else:
        outputs = kernels._scaled_dot_product_cudnn_attention(
            query, key, value, mask, True, dropout_p, is_causal, False, scale=scale
        )
    return outputs[0]


def _untouched(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor of the same layout on `device` whose memory nobody reads or writes: torch chooses by layout alone."""
    if tensor is None:
        return None
    real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return real.requires_grad_(tensor.requires_grad)
