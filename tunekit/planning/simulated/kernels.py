"""Functions that behave otherwise on the meta device, put right for a simulated computation.

Comes in: calls of attention and of grouped products on the meta device.  Goes out: the same calls, without values, as
the real device would make them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from tunekit.model.transformers_guard import replaced


@contextmanager
def kernels_as_on(device: torch.device) -> Iterator[None]:
    """Inside the block the meta device takes `device`'s kernels: for attention, where torch would take the one that
    makes all scores, and for the product of grouped rows (experts), where it knows bfloat16 only.

    The functions themselves are exchanged, because a torch function mode is not active in recomputation.
    """
    attention: Any = functional.scaled_dot_product_attention
    product: Any = getattr(functional, "grouped_mm", None)  # from torch 2.10 on

    def attend(query: Tensor, *inputs: Any, **named: Any) -> Tensor:
        if query.is_meta:
            return _attend(attention, device, query, *inputs, **named)
        return attention(query, *inputs, **named)  # type: ignore[no-any-return]

    def multiply(rows: Tensor, matrices: Tensor, **named: Any) -> Tensor:
        """Shapes: rows (S, I), matrices (E, I, O) -> (S, O): the size of the product with any one of them."""
        if rows.is_meta:
            return rows @ matrices[0]
        return product(rows, matrices, **named)  # type: ignore[no-any-return]

    others = {} if product is None else {"grouped_mm": multiply}
    with replaced(vars(functional), scaled_dot_product_attention=attend, **others):
        yield


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
    if device.type == "cuda" and not torch.cuda.is_available():
        choice = _likely_choice(query, attn_mask)
    else:
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


def _likely_choice(query: Tensor, mask: Tensor | None) -> SDPBackend:
    """What torch takes on a GPU that is planned for and is not here: flash attention knows half precision and no mask.

    Source: ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    return SDPBackend.FLASH_ATTENTION if half and mask is None else SDPBackend.EFFICIENT_ATTENTION


def _untouched(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor of the same layout on `device` whose memory nobody reads or writes: torch chooses by layout alone."""
    if tensor is None:
        return None
    real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return real.requires_grad_(tensor.requires_grad)
