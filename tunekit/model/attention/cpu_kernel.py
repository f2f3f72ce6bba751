"""Causal attention as matrix products for CPUs, where torch's own kernel is slow for rows of common lengths.

  P = softmax(scale Q K^T),  O = P V;   with G = dL/dO, S = scale P * (G V^T - rowsum(G * O)):
  dV = P^T G,  dQ = S K,  dK = S^T Q

A document may share a prefix that is computed in another document; it then has more keys than queries.
Queries are processed in blocks against the keys before them, in float32 for any input dtype, so that only the output
is rounded, as in torch's kernel. No T x T matrix is kept: P is recomputed. Query heads that share a key head are
stacked as rows of one matrix product, so keys and values are never repeated.

Milliseconds of this code and of torch's kernel, forward and backward, measured on one busy core with AVX512-BF16, with
9 query heads and 3 key heads of width 64. bfloat16: 2.2 and 4.0 (150 tokens), 19 and 22 (512 tokens), 62 and 55 (1,024
tokens). float32: 1.9 and 2.5 (150 tokens), 15 and 26 (512 tokens).
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK_QUERIES, MIN_QUERIES = 64, 16
SCORES_BYTES = 8 * 2**20  # maximum of one block's scores, in float32
MAX_TOKENS = 768  # maximum length of a document; torch's kernel is as fast for longer documents
Lengths = tuple[int, ...]


def attend_causally(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float, key_lengths: Lengths | None = None
) -> Tensor:
    """Causal attention inside each document of a row.

    Shapes: query (H, T, D), key (G, U, D), value (G, U, E), H a multiple of G -> (T, H, E). `lengths` sum to T, and
    `key_lengths` (None: the same as `lengths`) to U.
    """
    both = lengths, key_lengths or lengths
    return _CausalAttention.apply(query, key, value, both, scale)  # type: ignore[no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    """Autograd function of `attend_causally`. Its backward pass reads the saved inputs and the saved output."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[Lengths, Lengths], scale: float
    ) -> Tensor:
        heads, tokens, _ = query.shape
        output = query.new_empty(tokens, heads, value.shape[-1])  # (T, H, E)
        queries, keys, values = _wide(query), _wide(key), _wide(value)
        for now, before in _blocks(query, *lengths):
            probabilities = _probabilities(queries[:, now], keys[:, before], scale)  # (G, N, L)
            attended = torch.bmm(probabilities, values[:, before])  # (G, N, E)
            output[now] = attended.view(heads, now.stop - now.start, -1).transpose(0, 1)
        ctx.save_for_backward(query, key, value, output)
        ctx.lengths, ctx.scale = lengths, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        groups, scale = key.shape[0], ctx.scale
        queries, keys, values, through = _wide(query), _wide(key), _wide(value), _wide(gradients[0].transpose(0, 1))
        offsets = (through * output.transpose(0, 1)).sum(-1, keepdim=True).neg_()  # (H, T, 1)
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        for now, before in _blocks(query, *ctx.lengths):
            probabilities = _probabilities(queries[:, now], keys[:, before], scale)  # (G, N, L)
            of_output = _rows(through[:, now], groups)  # (G, N, E)
            of_value[:, before].baddbmm_(probabilities.transpose(1, 2), of_output)
            of_scores = torch.baddbmm(
                _rows(offsets[:, now], groups), of_output, values[:, before].transpose(1, 2), beta=scale, alpha=scale
            ).mul_(probabilities)  # (G, N, L)
            of_query[:, now] = torch.bmm(of_scores, keys[:, before]).view(query.shape[0], now.stop - now.start, -1)
            of_key[:, before].baddbmm_(of_scores.transpose(1, 2), _rows(queries[:, now], groups))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _wide(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(dtype, memory_format=torch.contiguous_format)


def _rows(tensor: Tensor, groups: int) -> Tensor:
    """(H, N, D) -> (G, H / G * N, D): the heads that share a key head, stacked along the rows."""
    return tensor.reshape(groups, -1, tensor.shape[-1])


def _probabilities(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention probabilities softmax(scale Q K^T) for the last N queries of a document that has L keys so far.

    Shapes: (H, N, D), (G, L, D) -> (G, H / G * N, L).
    """
    groups, (heads, count, _), length = keys.shape[0], queries.shape, keys.shape[1]
    allowed = queries.new_zeros(count, length)  # (N, L)
    allowed[:, length - count :] = _future(queries.dtype, queries.device)[:count, :count]
    scores = queries.new_empty(groups, heads // groups * count, length)
    scores.view(heads, count, length).copy_(allowed)
    scores.baddbmm_(_rows(queries, groups), keys.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


@cache
def _future(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(64, 64) mask: minus infinity where the key comes after the query, 0 elsewhere."""
    return torch.full((BLOCK_QUERIES, BLOCK_QUERIES), -math.inf, dtype=dtype, device=device).triu_(1)


def _blocks(query: Tensor, lengths: Lengths, key_lengths: Lengths) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries, each with the keys that its queries attend to. On the meta device, yield only the
    largest block, because it determines the memory."""
    start, first, blocks = 0, 0, []
    for length, keys in zip(lengths, key_lengths, strict=True):
        fitting = SCORES_BYTES // (4 * query.shape[0] * max(keys, 1))
        count = max(MIN_QUERIES, min(BLOCK_QUERIES, fitting))
        for begin in range(0, length, count):
            end = min(begin + count, length)
            blocks.append((slice(start + begin, start + end), slice(first, first + keys - length + end)))
        start, first = start + length, first + keys
    if query.is_meta:
        blocks = sorted(blocks, key=lambda block: math.prod(part.stop - part.start for part in block))[-1:]
    return iter(blocks)
