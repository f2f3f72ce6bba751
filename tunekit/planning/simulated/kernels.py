"""Attention and grouped matrix products on the meta device. They use the same kernels as the real device, so that the
simulated memory is right."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from tunekit.machine.cards import planned_card
from tunekit.machine.devices import capability, is_here
from tunekit.model.transformers_guard import replaced

FLASH_BACKWARD = (
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_flash_attention_backward",
    "torch_attn::_varlen_attn_backward",
)
FLASH_ROWS = 128
UNITS = 132  # multiprocessors of an H100, assumed for a GPU that is not in this machine
THREADS = 2


@contextmanager
def kernels_as_on(device: torch.device) -> Iterator[None]:
    """A context manager: inside the block, the meta device uses `device`'s kernels for attention and for grouped
    products (the matrix products of experts).

    Otherwise torch would use an attention kernel that stores all scores, and it would compute grouped products only in
    bfloat16. torch's functions are replaced globally, because a torch function mode is not active in recomputation.
    """
    product = getattr(functional, "grouped_mm", None)  # from torch 2.10 on
    others = {} if product is None else {"grouped_mm": partial(_multiply, product)}
    attend = _attention_on(device, functional.scaled_dot_product_attention)
    with replaced(vars(functional), scaled_dot_product_attention=attend, **others):
        yield


def _multiply(original: Callable[..., Tensor], rows: Tensor, matrices: Tensor, **named: object) -> Tensor:
    """The grouped product. On the meta device, it is replaced by a product with the first matrix, because the result
    has the same shape.

    Shapes: rows (S, I), matrices (E, I, O) -> (S, O).
    """
    return rows @ matrices[0] if rows.is_meta else original(rows, matrices, **named)


def _attention_on(device: torch.device, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function like torch's scaled_dot_product_attention, with the kernel that `device` would use."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **named: Any,
    ) -> Tensor:
        """Attention. Shapes: query (B, H, T, D), key and value (B, G, S, D) -> (B, H, T, D)."""
        if not query.is_meta:
            choice = SDPBackend.MATH  # torch chooses
        elif not is_here(device):
            choice = _likely_choice(device, query, key, attn_mask)
        else:
            real = [_untouched(tensor, device) for tensor in (query, key, value, attn_mask)]
            choose: Callable[..., int] = torch._fused_sdp_choice
            choice = SDPBackend(choose(*real, dropout_p, is_causal, **named))
        if choice == SDPBackend.MATH:
            return original(query, key, value, attn_mask, dropout_p, is_causal, **named)
        mask, scale = attn_mask, named.get("scale")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))  # as torch does itself
        kernels, tensors, masked = torch.ops.aten, (query, key, value), (mask, True, dropout_p, is_causal)
        outputs: tuple[Tensor, ...]
        if choice == SDPBackend.FLASH_ATTENTION and device.type == "cpu":
            flash = kernels._scaled_dot_product_flash_attention_for_cpu
            outputs = flash(*tensors, dropout_p, is_causal, attn_mask=mask, scale=scale)
        elif choice == SDPBackend.FLASH_ATTENTION:
            outputs = kernels._scaled_dot_product_flash_attention(*tensors, dropout_p, is_causal, False, scale=scale)
        elif choice in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.OVERRIDEABLE):  # the latter is XPU's own
            outputs = kernels._scaled_dot_product_efficient_attention(*tensors, *masked, scale=scale)
        else:
            outputs = kernels._scaled_dot_product_cudnn_attention(*tensors, *masked, False, scale=scale)
        return outputs[0]

    return attend


def _likely_choice(device: torch.device, query: Tensor, key: Tensor, mask: Tensor | None) -> SDPBackend:
    """The attention kernel that torch would probably use on a GPU that is not in this machine.

    Flash attention needs half precision, no mask, and on CUDA a card of capability 8.0 or later. The memory-efficient
    kernel needs equal numbers of key heads and query heads.

    Source: ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    flash = device.type != "cuda" or capability(device) >= (8, 0)
    if flash and query.dtype in (torch.float16, torch.bfloat16) and mask is None:
        return SDPBackend.FLASH_ATTENTION
    return SDPBackend.EFFICIENT_ATTENTION if query.shape[1] == key.shape[1] else SDPBackend.MATH


def backward_buffers(name: str, inputs: Sequence[Any], device: torch.device) -> list[int]:
    """Bytes of each internal buffer that flash attention allocates in the backward pass on CUDA.

    The buffers are: the gradient of the queries in float32 (rows rounded up to a multiple of 128, head sizes to a
    multiple of 32); one float32 number for each row and head; and the gradient of repeated keys and values.

    Source: ATen/native/transformers/cuda/flash_attn/flash_api.cpp (mha_bwd, mha_varlen_bwd).
    """
    if device.type != "cuda" or name not in FLASH_BACKWARD:
        return []
    query, key = inputs[1], inputs[2]
    if query.dim() == 4:  # (B, H, T, D)
        batch, heads, rows, size = query.shape
        rows, keys = batch * -(-rows // FLASH_ROWS) * FLASH_ROWS, batch * key.shape[2]
        of_keys = key.shape[1]
    else:  # (T, H, D), with the bounds of documents in another input
        batch = inputs[6].shape[0] - 1
        rows, heads, size = query.shape
        rows, (keys, of_keys, _) = rows + FLASH_ROWS * batch, key.shape
    wide, splits = -(-size // 32) * 32, 1
    if torch.are_deterministic_algorithms_enabled():
        units = _processors(device)
        splits = -(-units // (batch * heads))
    repeated = 2 * keys * heads * size * key.dtype.itemsize if of_keys != heads else 0
    return [4 * splits * rows * heads * wide, 4 * rows * heads, repeated]


def _processors(device: torch.device) -> int:
    """The number of multiprocessors."""
    if is_here(device):
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    card = planned_card()
    return UNITS if card is None else card.processors


def workspace_bytes(device: torch.device) -> int:
    """Bytes of cuBLAS's workspaces: one for the thread of the forward pass, and one for the thread of the backward
    pass.

    Source: ATen/cuda/CublasHandlePool.cpp (getChosenWorkspaceSize).
    """
    if device.type != "cuda":
        return 0
    written = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if written:
        return THREADS * sum(int(kib) * int(count) for kib, count in written) * 2**10
    return THREADS * (4096 * 8 * 2**10 if capability(device) >= (9, 0) else 4096 * 2**11 + 16 * 2**13)


def _untouched(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """An uninitialised tensor with the same shape, strides and dtype on `device`. torch needs no more to choose a
    kernel."""
    if tensor is None:
        return None
    real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return real.requires_grad_(tensor.requires_grad)
