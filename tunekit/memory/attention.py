"""scaled_dot_product_attention of a simulated computation, by the kernel that the real device would pick.

Comes in: attention calls on the meta device, where torch itself always takes the kernel that makes all scores.
Goes out: the same call through the real device's kernel, without values.  Next: estimate.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode


class AttentionAsOn(TorchFunctionMode):
    """Attention on the meta device as on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            return self._attend(func, *args, **named)
        return func(*args, **named)

    def _attend(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        choice = self._choice(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        aten = torch.ops.aten
        if attn_mask is not None and attn_mask.dtype == torch.bool and choice != SDPBackend.MATH:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        if choice == SDPBackend.FLASH_ATTENTION and self.device.type == "cpu":
            output: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
            return output
        if choice == SDPBackend.FLASH_ATTENTION:
            output = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
            return output
        if choice == SDPBackend.EFFICIENT_ATTENTION:
            output = aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
            )[0]
            return output
        if choice == SDPBackend.CUDNN_ATTENTION:
            output = aten._scaled_dot_product_cudnn_attention(
                query, key, value, attn_mask, True, dropout_p, is_causal, False, scale=scale
            )[0]
            return output
        output = func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return output

    def _choice(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
        scale: float | None, grouped: bool,
    ) -> SDPBackend:
        """Ask torch with tensors of the same layout on the real device; their memory is never touched."""
        real = [
            None if tensor is None else torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
            ).requires_grad_(tensor.requires_grad)
            for tensor in (query, key, value, mask)
        ]
        return SDPBackend(torch._fused_sdp_choice(*real, dropout, causal, scale=scale, enable_gqa=grouped))
