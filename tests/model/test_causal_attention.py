"""Causal attention as matrix products against torch's own, values and gradients; what it keeps; the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunekit.model.attention import cpu_kernel as causal_attention
from tunekit.model.attention.cpu_kernel import attend_causally

LENGTHS = (70, 1, 133)  # more than one block, one token, three blocks


def make_inputs(dtype: torch.dtype, heads: int, groups: int, wide: int = 8, size: int = 16) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = [(heads, tokens, size), (groups, tokens, size), (groups, tokens, wide)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """torch's attention over each document, in the inputs' dtype."""
    outputs, repeats = [], query.shape[0] // key.shape[0]
    for parts in zip(*(tensor.split(LENGTHS, dim=1) for tensor in (query, key, value)), strict=True):
        q, k, v = parts[0], *(part.repeat_interleave(repeats, 0) for part in parts[1:])
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def values_and_gradients(attend: object, inputs: list[Tensor], *more: object) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attend(*leaves, *more)  # type: ignore[operator]
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


@pytest.mark.parametrize(("heads", "groups", "wide"), [(6, 6, 16), (6, 2, 16), (4, 1, 8)])
@pytest.mark.parametrize("least", [causal_attention.SCORES_BYTES, 1], ids=["blocks of 64", "blocks of 16"])
def test_values_and_gradients_equal_torchs(
    heads: int, groups: int, wide: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_attention, "SCORES_BYTES", least)
    inputs = make_inputs(torch.float32, heads, groups, wide)
    ours = values_and_gradients(attend_causally, inputs, LENGTHS, 0.3)
    exact = values_and_gradients(reference, [tensor.double() for tensor in inputs], 0.3)
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)


def test_in_bfloat16_it_rounds_about_as_much_as_torchs_kernel() -> None:
    inputs = make_inputs(torch.bfloat16, 6, 2, 64, size=64)
    exact = values_and_gradients(reference, [tensor.double() for tensor in inputs], 0.125)
    ours = values_and_gradients(attend_causally, inputs, LENGTHS, 0.125)
    torchs = values_and_gradients(reference, inputs, 0.125)
    for found, other, expected in zip(ours, torchs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() <= 1.4 * (other.double() - expected).norm()


def test_documents_do_not_see_each_other_bit_for_bit() -> None:
    query, key, value = make_inputs(torch.float32, 6, 2)
    packed = attend_causally(query, key, value, LENGTHS, 0.3)
    start = sum(LENGTHS[:2])
    alone = attend_causally(query[:, start:], key[:, start:], value[:, start:], LENGTHS[2:], 0.3)
    assert torch.equal(packed[start:], alone)


def test_no_scores_are_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        leaves = [tensor.requires_grad_() for tensor in make_inputs(torch.float32, 6, 2)]
        output = attend_causally(*leaves, LENGTHS, 0.3)
    assert sorted(kept) == sorted([*(leaf.numel() for leaf in leaves), output.numel()])


def test_without_values_shapes_and_gradients_are_the_same() -> None:
    real = values_and_gradients(attend_causally, make_inputs(torch.float32, 6, 2), LENGTHS, 0.3)
    inputs = [tensor.to("meta") for tensor in make_inputs(torch.float32, 6, 2)]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output = attend_causally(*leaves, LENGTHS, 0.3)
    found = [output, *torch.autograd.grad(output.sum(), leaves)]
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [(tensor.shape, tensor.dtype) for tensor in real]
