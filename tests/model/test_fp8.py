"""float8 weights: what they hold, that products and gradients are those of the rounded numbers, what plan says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.loop_case import make_case, make_rows
from tests.support.plans import make_plan
from tests.support.train_case import write_recipe
from tests.training.test_loop import training
from tunekit.model.quantized import codec, fp8
from tunekit.model.quantized.weights import PackedLinear, multiplies_exactly, pack_linear
from tunekit.planning import checks
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection

GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(48, 32, generator=GENERATOR) * torch.logspace(-3, 1, 48)[:, None]


def test_a_packed_matrix_has_the_declared_tensors_and_a_relative_error_of_4_bits() -> None:
    tensors = codec.pack(MATRIX, "fp8", True)
    declared = codec.packed_shapes((48, 32), "fp8", True)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == declared
    dense = codec.unpack(tensors, (48, 32), "fp8", torch.float32)
    largest = MATRIX.abs().amax(1, keepdim=True)
    assert ((dense - MATRIX).abs() <= torch.maximum(MATRIX.abs() / 16, largest / 448 / 512) * 1.001).all()
    again = codec.pack(dense, "fp8", True)
    assert torch.equal(again["packed"], tensors["packed"])
    zero = codec.pack(torch.zeros(3, 32), "fp8", True)
    assert torch.equal(codec.unpack(zero, (3, 32), "fp8", torch.bfloat16), torch.zeros(3, 32, dtype=torch.bfloat16))


def test_the_product_is_that_of_the_rounded_numbers_and_its_gradient_that_of_the_matrix() -> None:
    linear = nn.Linear(32, 48)
    linear.weight.data.copy_(MATRIX)
    layer = pack_linear(linear, "fp8", True, torch.float32)
    assert isinstance(layer, PackedLinear)
    assert not multiplies_exactly(layer)
    x = torch.randn(2, 5, 32, generator=GENERATOR, requires_grad=True)
    values, absmax = fp8.round_rows(x.detach().reshape(-1, 32))
    near = values.float() * (absmax / 448)[:, None]
    expected = near @ layer.dequantize(torch.float32).t() + linear.bias
    y = layer(x)
    torch.testing.assert_close(y.reshape(-1, 48), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, linear(x), rtol=1e-3)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize(torch.float32).sum(0).expand(2, 5, 32))


def test_it_trains_near_the_dense_base(tiny_llama: Path) -> None:
    curves = []
    for quantization in ("none", "fp8"):
        model = ModelSection(name_or_path=str(tiny_llama), dtype="float32", quantization=quantization)  # type: ignore[arg-type]
        case = make_case(tiny_llama, make_rows(23), training=training(max_steps=3), model=model)
        case.run()
        curves.append(case.losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)
    assert curves[1] != curves[0]
    assert all(math.isfinite(loss) for loss in curves[1])


def test_plan_names_it_approximate_and_refuses_older_gpus(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(write_recipe(tmp_path, tiny_llama), ["model.quantization=fp8"])
    plan, _ = make_plan(loaded, device=torch.device("cpu"))
    assert not plan.refusals
    assert any("fp8 is approximate" in note and "slow" in note for note in plan.notes)
    monkeypatch.setattr(checks, "capability", lambda device: (8, 0))
    (problem,) = checks.device_problems(loaded.recipe, torch.device("cuda"))
    assert problem.key == "model.quantization"
    assert "8.9" in problem.what
