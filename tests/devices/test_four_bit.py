"""Products with 4-bit weights: bitsandbytes' fused kernel where nothing is trained, exact ones in a step; and what its
kernels read by raw pointer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices import kernels
from tests.devices.test_mistakes import CUDA, case_of
from tests.devices.test_runs import train, whole_device
from tests.devices.test_steps import section
from tunekit.evaluate import evaluate_verb
from tunekit.generate import generate_verb
from tunekit.model.call import calling, current_call
from tunekit.model.quantized import codec
from tunekit.model.quantized.weights import PackedLinear, pack_linear

__all__ = ["whole_device"]


def packed(quantization: str, double: bool, inputs: int = 128) -> PackedLinear:
    torch.manual_seed(0)
    layer = pack_linear(torch.nn.Linear(inputs, 96), quantization, double, torch.bfloat16)
    assert isinstance(layer, PackedLinear)
    return layer.to(CUDA)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("fuses", [True, False])
def test_the_fused_kernel_computes_the_same_product(quantization: str, double: bool, fuses: bool) -> None:
    layer, x = packed(quantization, double), torch.randn(2, 3, 128).to(CUDA, torch.bfloat16)
    kernels.CALLED.clear()
    with calling(replace(current_call(), fuses=fuses)), torch.no_grad():
        product = layer(x)
    assert kernels.CALLED["gemm_4bit"] == int(fuses)
    assert layer.bias is not None
    torch.testing.assert_close(product, x @ layer.dequantize(x.dtype).t() + layer.bias, rtol=2e-2, atol=1e-2)


def test_a_matrix_whose_blocks_pass_the_ends_of_rows_is_unpacked() -> None:
    layer = packed("nf4", double=True, inputs=96)
    kernels.CALLED.clear()
    with calling(replace(current_call(), fuses=True)), torch.no_grad():
        layer(torch.randn(3, 96).to(CUDA, torch.bfloat16))
    assert kernels.CALLED["gemm_4bit"] == 0


def test_evaluation_and_generation_take_it_and_steps_do_not(folder: Path, tmp_path: Path) -> None:
    kernels.CALLED.clear()
    case_of(folder, model=section(folder, quantization="nf4")).run()
    assert kernels.CALLED["dequantize_4bit"] > 0
    assert kernels.CALLED["gemm_4bit"] == 0
    run, _ = train(tmp_path, folder, "model.quantization=nf4")
    for use in (
        lambda: evaluate_verb(str(run), None, None, None, [], str(tmp_path / "eval.json"), []),
        lambda: generate_verb(str(run), None, ["say 3"], None, [], max_new_tokens=4),
    ):
        kernels.CALLED.clear()
        use()
        assert kernels.CALLED["gemm_4bit"] > 0


@pytest.mark.parametrize(
    "mistake",
    [
        lambda tensors: tensors | {"absmax": tensors["absmax"].double()},
        lambda tensors: tensors | {"absmax": tensors["absmax"].cpu()},
        lambda tensors: tensors | {"packed": torch.cat([tensors["packed"]] * 2, 1)[:, :1]},
    ],
    ids=["dtype", "device", "gaps"],
)
def test_a_wrong_tensor_does_not_reach_a_raw_pointer(mistake: Any) -> None:
    layer = packed("nf4", double=False)
    with pytest.raises(RuntimeError, match="by a raw pointer"):
        codec.unpack(mistake(layer.tensors()), (96, 128), "nf4", torch.bfloat16)
