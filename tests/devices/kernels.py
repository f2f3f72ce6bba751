"""Kernels that only an accelerator has, from torch's own operators, with the checks that the real ones make."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

KEYS = 128  # of a block; over more of them the real kernel adds up the gradient of the queries in no fixed order
NOISE = torch.Generator()  # seeded by nobody

if TYPE_CHECKING:
    from tests.devices.simulated import Double


def register_plain_attention(kind: str) -> None:
    """Of XPU and MPS: what torch falls back to, since here there is none of the kernels among which it chooses."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False,
        **named: Any,
    ) -> Tensor:  # fmt: skip
        output: Tensor = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, **named)[0]
        return output

    global LIBRARY
    LIBRARY = torch.library.Library("aten", "IMPL")
    for key in (kind.upper(), f"Autograd{kind.upper()}"):
        LIBRARY.impl("scaled_dot_product_attention", attend, key)
    LIBRARY.impl("_fused_sdp_choice", lambda *tensors, **named: torch.nn.attention.SDPBackend.MATH.value, kind.upper())


def register(double: Double) -> None:
    """Flash attention over documents of varying lengths, forward and backward."""

    def forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any, scale: Any = None, **named: Any) -> Any:
        _check(double, q, k, v, starts)
        empty = torch.empty(0, device=q.device)
        with double.unwatched(), torch.no_grad():
            out = torch.cat([_attention(*part, scale)[0] for part in _documents(starts, q, k, v)])
        seeds = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return out.to(q.dtype), torch.zeros(q.shape[1], q.shape[0], device=q.device), seeds, empty, empty

    def backward(
        gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, starts: Tensor, *rest: Any,
        scale: Any = None, **named: Any,
    ) -> Any:  # fmt: skip
        _check(double, q, k, v, starts)
        with double.unwatched(), torch.no_grad():
            found = [_gradients(*part, scale) for part in _documents(starts, q, k, v, gradient)]
            of_q, *others = (torch.cat(each) for each in zip(*found, strict=True))
            of_k, of_v = (each.unflatten(1, (k.shape[1], -1)).sum(2) for each in others)
            longest = max(end - start for start, end in pairwise(starts.tolist()))
            if longest > KEYS and not torch.are_deterministic_algorithms_enabled():
                of_q = of_q * (1 + 1e-6 * torch.randn(of_q.shape, generator=NOISE).to(of_q.device))
        return of_q.to(q.dtype), of_k.to(q.dtype), of_v.to(q.dtype)

    global LIBRARY
    LIBRARY = torch.library.Library("aten", "IMPL")
    LIBRARY.impl("_flash_attention_forward", forward, "CUDA")
    LIBRARY.impl("_flash_attention_backward", backward, "CUDA")


def _check(double: Double, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> None:
    if double.properties.major < 8:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimensions that are multiples of 8, at most 256")
    assert starts.dtype == torch.int32
    assert all(tensor.is_cuda and tensor.stride(-1) == 1 for tensor in (q, k, v, starts))


def _documents(starts: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> list[list[Tensor]]:
    """Each document's part of every tensor, (t, heads, d) float32; keys and values repeated for each head."""
    times, bounds = q.shape[1] // k.shape[1], starts.tolist()
    whole = [each.float() for each in (q, *(each.repeat_interleave(times, 1) for each in (k, v)), *more)]
    return [[each[start:end] for each in whole] for start, end in pairwise(bounds)]


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, float]:
    """What the heads give (t, heads, d), their weights (heads, t, t), and the scale."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    future = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    weights = (torch.einsum("thd,shd->hts", q, k) * scale).masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v), weights, scale


def _gradients(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float | None) -> tuple[Tensor, ...]:
    """Of q, k and v, (t, heads, d) each."""
    _, weights, scale = _attention(q, k, v, scale)
    of_weights = torch.einsum("thd,shd->hts", gradient, v)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    of_keys, of_values = torch.einsum("hts,thd->shd", of_scores, q), torch.einsum("hts,thd->shd", weights, gradient)
    return torch.einsum("hts,shd->thd", of_scores, k), of_keys, of_values
