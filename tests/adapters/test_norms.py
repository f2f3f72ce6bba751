"""Norms that keep less: the same bits forward, the same gradient up to rounding; and who gets one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tunekit.adapters.kernels.norms import LightNorm, computes_rms_norm, lighten_norms


def make_norm(dtype: torch.dtype, light: bool) -> Any:
    norm: Any = LlamaRMSNorm(48, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, 48))
    if light:
        lighten_norms(norm)
        assert isinstance(norm.forward, LightNorm)
    return norm


def run(norm: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Output, gradient, and bytes that the forward kept."""
    draw = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 7, 48, generator=draw)).to(dtype).requires_grad_()
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if tensor is x or tensor is norm.weight else tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = norm(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=draw).to(y.dtype))
    return y.detach(), gradient, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_light_norm_is_the_same_norm(dtype: torch.dtype) -> None:
    plain, light = run(make_norm(dtype, False), dtype), run(make_norm(dtype, True), dtype)
    assert torch.equal(plain[0], light[0])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(light[1], plain[1], rtol=tolerance, atol=tolerance)
    assert light[2] < plain[2], "(..., 1) alone"


def test_where_the_weight_is_trained_its_gradient_is_there() -> None:
    norm = make_norm(torch.float32, True).requires_grad_(True)
    norm(torch.randn(3, 48, requires_grad=True)).sum().backward()
    assert norm.weight.grad.abs().max() > 0


def test_a_copied_norm_reads_its_own_weight() -> None:
    norm = make_norm(torch.float32, True)
    copied = deepcopy(norm)
    with torch.no_grad():
        copied.weight.zero_()
    x = torch.randn(3, 48, requires_grad=True)
    assert copied(x).abs().max() == 0 < norm(x).abs().max()


def test_only_norms_of_this_kind_are_changed() -> None:
    class Other(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    assert computes_rms_norm(LlamaRMSNorm(4))
    assert computes_rms_norm(Qwen3RMSNorm(4))
    for other in (Other(4), GemmaRMSNorm(4), nn.LayerNorm(4), nn.RMSNorm(4)):
        assert not computes_rms_norm(other)
        lighten_norms(other)
        assert not isinstance(other.forward, LightNorm)
