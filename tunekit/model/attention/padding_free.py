"""Encoder layers without padding: in the layers, the real tokens of all rows form one sequence. Each row attends only
to itself.

A hook before the first layer removes the padding. A hook after the last layer restores it as zeros, which no head
reads. This is done only on a CPU: elsewhere the number of real tokens would have to be read from the device.

  P = softmax(scale Q K^T),  O = drop(P) V;   with G = dL/dO and H = drop'(G V^T):
  dV = drop(P)^T G,  S = scale P * (H - rowsum(H * P)),  dQ = S K,  dK = S^T Q

Short rows of similar length attend in one padded product in float32, as torch's plain attention computes it. Longer
rows go to torch's kernel one by one. Measured with 32 rows of Banking77 (16 tokens on average), 12 heads of width 32,
forward and backward of six layers on a busy core: 124 ms in groups of similar length, 191 ms as one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.contracts import Tensors
from tunekit.model.attention.documents import AttentionOutput, DocumentMask, LayerMask, attend_by_sdpa
from tunekit.model.attention.real_tokens import RealTokens, RowGroup
from tunekit.model.attention.segments import Segments
from tunekit.model.autograd import Context
from tunekit.model.call import current_call
from tunekit.model.dropout import dropout_noise, quicken_dropout
from tunekit.model.pretrained import config_of, text_config

NAME = "sdpa_padding_free"  # the attention function's name in transformers' table
MAX_TOKENS = 128  # maximum length of a row in the padded product, whose scores grow with the square of the length

# Families for which tests prove that rows without padding equal padded rows. Their layers need nothing but hidden
# states and a mask, and only attention connects tokens.
PROVEN = frozenset(["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"])


def skip_padding(net: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
    """Make the net compute its layers without padding, if its family is tested and it runs on a CPU with torch's
    attention."""
    config = config_of(net)
    if device.type != "cpu" or config._attn_implementation != "sdpa" or text_config(net).model_type not in PROVEN:
        return
    if getattr(text_config(net), "is_decoder", False):
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    config._attn_implementation = NAME
    quicken_dropout(net)
    layers[0].register_forward_pre_hook(_remove_padding, with_kwargs=True)
    layers[-1].register_forward_hook(_restore_padding)


def _remove_padding(
    layer: nn.Module, inputs: tuple[Any, ...], named: Tensors
) -> tuple[tuple[Any, ...], Tensors] | None:
    """The first layer's inputs with hidden states (1, M, D) in place of (B, T, D)."""
    real = current_call().real_tokens
    if real is None:
        return None
    hidden, *others = inputs
    real_hidden = hidden.flatten(0, 1).index_select(0, real.filled_index.to(hidden.device))  # (M, D)
    return (real_hidden[None], *others), named


def _restore_padding(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Put the last layer's output (1, M, D) back into padded rows (B, T, D)."""
    real = current_call().real_tokens
    return None if real is None else real.padded(output)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LayerMask, **named: object
) -> AttentionOutput:
    """Attention of rows without padding, (1, H, M, D) -> (1, M, H, D); other calls go to sdpa."""
    real = current_call().real_tokens
    if real is None or query.shape[:3:2] != (1, len(real.filled_index)):
        return attend_by_sdpa(module, query, key, value, attention_mask, **named)
    if max(real.lengths) > MAX_TOKENS:
        mask = DocumentMask(Segments((real.lengths,)), None, query.device)
        count, filled = len(real.index), query.shape[2]
        query, key, value = (tensor[:, :, :count] for tensor in (query, key, value))
        output = attend_by_sdpa(module, query, key, value, mask, **named)[0]  # (1, N, H, D)
        return F.pad(output, (0, 0, 0, 0, 0, filled - count)), None
    scale = cast("float | None", named.get("scaling")) or query.shape[-1] ** -0.5
    dropout = cast("float | None", named.get("dropout")) or 0.0
    tensors = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (M, H, D), as the projections return them
    return _RowAttention.apply(*tensors, real, scale, dropout)[None], None  # type: ignore[no-untyped-call]


class _RowAttention(torch.autograd.Function):
    """Autograd function: attention of each row to itself. The output is zero after the real tokens.

    Shapes: query, key, value (M, H, D) -> (M, H, D).
    """

    @staticmethod
    def forward(
        ctx: Context[tuple[RealTokens, float]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: RealTokens,
        scale: float,
        dropout: float,
    ) -> Tensor:
        output, saved = torch.zeros_like(query, memory_format=torch.contiguous_format), list[Tensor]()
        for group in real.groups:
            queries, keys, values = (_padded(tensor, group) for tensor in (query, key, value))  # (B * H, T, D)
            bias = group.bias.to(queries).expand(-1, query.shape[1], -1, -1).flatten(0, 1)  # (B * H, 1, T)
            scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
            probabilities = torch.softmax(scores, -1, out=scores)
            weights, masks = probabilities, list[Tensor]()
            if dropout:
                masks = [dropout_noise(probabilities, dropout)]  # (B * H, T, T)
                weights = probabilities * masks[0]
            saved += [probabilities, *masks]
            _write_real(torch.bmm(weights, values), group, output)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.extra = real, scale
        return output

    @staticmethod
    def backward(ctx: Context[tuple[RealTokens, float]], *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        real, scale = ctx.extra
        inputs = [torch.zeros_like(query, memory_format=torch.contiguous_format) for _ in range(3)]
        each = len(saved) // len(real.groups)
        for number, group in enumerate(real.groups):
            probabilities, *masks = saved[each * number : each * (number + 1)]
            queries, keys, values = (_padded(tensor, group) for tensor in (query, key, value))
            of_output = _padded(gradients[0], group, exact=True)  # (B * H, T, D)
            weights = probabilities * masks[0] if masks else probabilities
            of_value = torch.bmm(weights.transpose(1, 2), of_output)
            of_scores = torch.bmm(of_output, values.transpose(1, 2))  # (B * H, T, T)
            of_scores = of_scores.mul_(masks[0]) if masks else of_scores
            offsets = torch.linalg.vecdot(of_scores, probabilities)[..., None]
            of_scores.sub_(offsets).mul_(probabilities).mul_(scale)
            of_query, of_key = torch.bmm(of_scores, keys), torch.bmm(of_scores.transpose(1, 2), queries)
            for padded, gradient in zip((of_query, of_key, of_value), inputs, strict=True):
                _write_real(padded, group, gradient)
        return *inputs, None, None, None


def _padded(tensor: Tensor, group: RowGroup, *, exact: bool = False) -> Tensor:
    """Put the group's rows of (M, H, D) into padded rows (B * H, T, D) in float32. Padding has the values of a real
    token, or zeros if `exact`."""
    places, there, inverse = (index.to(tensor.device) for index in group.places(tensor.shape[1]))
    flat, dtype = tensor.flatten(0, 1), torch.promote_types(tensor.dtype, torch.float32)  # (M * H, D)
    if exact:
        real = flat.index_select(0, places).to(dtype)
        padded = real.new_zeros(len(inverse), flat.shape[1]).index_copy_(0, there, real)
    else:
        padded = flat.index_select(0, inverse).to(dtype)
    return padded.view(-1, group.longest, flat.shape[1])


def _write_real(padded: Tensor, group: RowGroup, output: Tensor) -> None:
    """Write the group's tokens from padded rows (B * H, T, D) to their places in `output` (M, H, D)."""
    places, there, _ = (index.to(output.device) for index in group.places(output.shape[1]))
    real = padded.flatten(0, 1).index_select(0, there).to(output.dtype)
    output.view(-1, output.shape[-1]).index_copy_(0, places, real)
