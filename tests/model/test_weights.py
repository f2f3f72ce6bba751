"""Packed layers and the handle over dense and packed weights, against bitsandbytes and plain torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.packed import packed_hash
from tunekit.errors import ModelError
from tunekit.model.quantized import codec
from tunekit.model.quantized.weights import (
    PackedLinear,
    element_count,
    layer_kind,
    pack_linear,
    stored_bytes,
    weight_of,
)

QUANTIZATIONS = ["nf4", "fp4", "int8", "int8_weight_only"]
DTYPES = [torch.float32, torch.bfloat16]


def make_linear(dtype: torch.dtype = torch.float32, in_features: int = 128, out_features: int = 96) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(in_features, out_features).to(dtype).requires_grad_(False)


def make_input(dtype: torch.dtype, features: int = 128) -> torch.Tensor:
    return torch.randn(2, 5, features, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_four_bit_equals_linear4bit(quantization: str, double: bool, dtype: torch.dtype) -> None:
    bitsandbytes = codec.import_bitsandbytes()
    linear = make_linear(dtype)
    theirs = bitsandbytes.nn.Linear4bit(
        128, 96, compute_dtype=dtype, compress_statistics=double, quant_type=quantization
    )
    theirs.weight.data, theirs.bias.data = linear.weight.data.clone(), linear.bias.data.clone()
    theirs.to("cpu")
    theirs.requires_grad_(False)
    ours = pack_linear(linear, quantization, double, dtype)
    assert isinstance(ours, PackedLinear)
    state = theirs.weight.quant_state
    assert torch.equal(ours.get_buffer("packed"), theirs.weight.data)
    assert torch.equal(ours.get_buffer("absmax"), state.absmax)
    reference = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, state)
    assert torch.equal(ours.dequantize(dtype), reference)
    x, x_theirs = make_input(dtype).requires_grad_(), make_input(dtype).requires_grad_()
    y = ours(x)
    y_theirs = theirs(x_theirs)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # their product may round elsewhere; the weights are equal
    torch.testing.assert_close(y, y_theirs, rtol=tolerance, atol=tolerance)
    y.float().square().sum().backward()
    y_theirs.float().square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=tolerance, atol=tolerance)


def test_int8_equals_linear8bitlt_with_outliers() -> None:
    bitsandbytes = codec.import_bitsandbytes()
    linear = make_linear(torch.float16)
    theirs = bitsandbytes.nn.Linear8bitLt(128, 96, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu").eval()
    theirs.state.is_training = False
    ours = pack_linear(linear, "int8", False, torch.float16)
    x = make_input(torch.float16)
    x[..., 7] *= 20  # an outlier column
    assert x.abs().max() > 6
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8_weight_only"])
def test_gradients_equal_those_of_the_dense_matrix(quantization: str, dtype: torch.dtype) -> None:
    packed = pack_linear(make_linear(dtype), quantization, True, dtype)
    assert isinstance(packed, PackedLinear)
    assert packed.bias is not None
    packed.bias.requires_grad_()
    dense = nn.Linear(128, 96).to(dtype)
    dense.weight.data, dense.bias.data = packed.dequantize(dtype), packed.bias.detach().clone()
    x, x_dense = make_input(dtype).requires_grad_(), make_input(dtype).requires_grad_()
    weights = torch.linspace(-1, 1, 96).to(dtype)
    (packed(x) * weights).sum().backward()
    (dense(x_dense) * weights).sum().backward()
    assert torch.equal(packed(x), dense(x))
    torch.testing.assert_close(x.grad, x_dense.grad)
    torch.testing.assert_close(packed.bias.grad, dense.bias.grad, rtol=2e-2, atol=1e-4)


def test_backward_keeps_no_dense_weight() -> None:
    packed = pack_linear(make_linear(), "nf4", True, torch.float32)
    saved: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    x = make_input(torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed(x)
    assert saved == []


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(96, 128), (7, 5), (33, 1), (10, 100), (3, 7)])
def test_meta_layer_has_the_shapes_and_bytes_of_the_real_one(
    quantization: str, double: bool, shape: tuple[int, int]
) -> None:
    linear = make_linear(in_features=shape[1], out_features=shape[0])
    real = pack_linear(linear, quantization, double, torch.float32)
    meta = pack_linear(linear.to("meta"), quantization, double, torch.float32)
    described = [(name, tensor.shape, tensor.dtype) for name, tensor in real.named_buffers()]
    assert described == [(name, tensor.shape, tensor.dtype) for name, tensor in meta.named_buffers()]
    assert stored_bytes(real) == stored_bytes(meta)
    assert element_count(real) == element_count(meta) == shape[0] * shape[1] + shape[0]
    output = meta(torch.empty(2, shape[1], device="meta"))
    assert output.is_meta
    assert output.shape == (2, shape[0])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("shape", [(96, 128), (7, 5), (33, 1), (10, 100)])
def test_matrix_comes_back_within_the_steps_of_its_packing(quantization: str, shape: tuple[int, int]) -> None:
    """Also where a row is no multiple of a block: an error of position would be as large as the weights."""
    linear = make_linear(in_features=shape[1], out_features=shape[0])
    weight = weight_of(pack_linear(linear, quantization, True, torch.float32))
    assert weight is not None
    assert weight.shape == shape
    assert weight.kind == quantization
    error = (weight.read() - linear.weight).abs().max()
    step = {"nf4": 0.16, "fp4": 0.18}.get(quantization, 0.005)
    assert error <= step * linear.weight.abs().max()


def test_double_quantization_takes_4_127_bits_a_weight() -> None:
    packed = pack_linear(nn.Linear(1024, 1024, bias=False), "nf4", True, torch.float32)
    assert stored_bytes(packed) * 8 / 1024**2 == pytest.approx(4.127, abs=5e-4)


def test_quantization_is_deterministic_and_hashed() -> None:
    first, second = (nn.Sequential(pack_linear(make_linear(), "nf4", True, torch.float32)) for _ in range(2))
    assert packed_hash(first) == packed_hash(second)
    first[0].get_buffer("packed")[0] ^= 1
    assert packed_hash(first) != packed_hash(second)


def test_scales_survive_a_cast_of_the_net() -> None:
    net = nn.Sequential(pack_linear(make_linear(), "nf4", False, torch.float32))
    before = net[0].get_buffer("absmax").clone()
    net.to(torch.bfloat16)
    assert torch.equal(net[0].get_buffer("absmax"), before)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_replace_packs_again(quantization: str) -> None:
    packed = pack_linear(make_linear(), quantization, True, torch.float32)
    weight = weight_of(packed)
    assert weight is not None
    other = torch.randn(96, 128, generator=torch.Generator().manual_seed(9))
    weight.replace(other)
    assert (weight.read() - other).abs().max() < 0.2 * other.abs().max()
    with pytest.raises(ValueError, match="shape"):
        weight.replace(other.t())


def test_replace_of_a_tied_matrix_leaves_its_partner() -> None:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    weight = weight_of(head)
    assert weight is not None
    before = embedding.weight.detach().clone()
    weight.replace(weight.read() + 1)
    assert torch.equal(embedding.weight, before)
    assert torch.equal(head.weight, before + 1)


def test_handles_of_every_dense_layer() -> None:
    from transformers.pytorch_utils import Conv1D

    conv: Any = Conv1D(6, 4)  # 4 in, 6 out, stored (in, out)
    weight = weight_of(conv)
    assert weight is not None
    assert (layer_kind(conv), weight.shape) == ("conv1d", (6, 4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(x @ weight.read().t() + conv.bias, conv(x))
    weight.replace(weight.read() * 2)
    torch.testing.assert_close(x @ weight.read().t() + conv.bias, conv(x))
    packed = pack_linear(conv, "nf4", True, torch.float32)
    assert isinstance(packed, PackedLinear)
    assert (packed.out_features, packed.in_features) == (6, 4)
    embedding = nn.Embedding(10, 4)
    handle = weight_of(embedding)
    assert handle is not None
    assert (layer_kind(embedding), handle.shape, handle.kind) == ("embedding", (10, 4), "dense")
    assert weight_of(nn.LayerNorm(4)) is None
    assert weight_of(nn.Conv1d(2, 2, 1)) is None


def test_read_is_a_copy() -> None:
    linear = make_linear()
    weight = weight_of(linear)
    assert weight is not None
    before = linear.weight.detach().clone()
    weight.read().zero_()
    assert torch.equal(linear.weight, before)


def test_damaged_weights_are_refused() -> None:
    linear = make_linear()
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        pack_linear(linear, "nf4", True, torch.float32)


def test_counts_take_tied_parameters_once() -> None:
    net = nn.Module()
    net.embedding, net.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    net.head.weight = net.embedding.weight
    assert element_count(net) == 40
    assert stored_bytes(net) == 160


IMPORT = """
import sys, types
trap = types.ModuleType("kernels")
def get_kernel(*a, **k):
    raise SystemExit("downloaded code")
trap.get_kernel = get_kernel
sys.modules["kernels"] = trap
import torch
compiler = torch.compile
from tunekit.model.quantized.codec import import_bitsandbytes
import tunekit.model.quantized.weights
assert "bitsandbytes" not in sys.modules
import_bitsandbytes()
assert "bitsandbytes" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile is compiler
assert sys.modules["kernels"] is trap
assert trap.get_kernel is get_kernel
"""


@pytest.mark.drawn
def test_import_of_bitsandbytes_fetches_and_compiles_nothing() -> None:
    """bitsandbytes asks `kernels` for native code on some CPUs, and compiles at import."""
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
