"""Packs and unpacks quantized matrices: NF4 and FP4 in bitsandbytes' layout, and int8 with one scale per row. It also
unpacks the blocks of GGUF files.

bitsandbytes is imported only here, and only when needed: for 4 bits on devices other than a CPU, and for LLM.int8.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunekit.contracts import Tensors
from tunekit.errors import ModelError
from tunekit.machine.devices import kind_of
from tunekit.machine.versions import needed, package
from tunekit.model.quantized import blocks, four_bit, fp8
from tunekit.model.quantized.four_bit import BLOCK, NESTED_BLOCK
from tunekit.model.transformers_guard import no_fetched_code, replaced

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

FOUR_BIT = ("nf4", "fp4")
EIGHT_BIT = ("int8", "int8_weight_only")


def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes without the side effects of its import.

    On a CPU with AVX512-BF16, bitsandbytes would download and run native code through the package `kernels`. It also
    compiles two functions, which loads torch's compiler. During the import, `kernels` therefore cannot be imported,
    and torch.compile does nothing.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with no_fetched_code(), replaced(vars(torch), compile=_uncompiled):
            import_module("bitsandbytes.functional")
    except Exception as error:
        what, how = needed("this quantization", f"run: pip install {package('bitsandbytes').requirement}", error)
        others = "or choose quantization none or int8_weight_only"
        raise ModelError(what, f"{how}, {others}", key="model.quantization") from error
    finally:
        logger.setLevel(level)
    return sys.modules["bitsandbytes"]


def _uncompiled(function: Callable[..., object] | None = None, **_settings: object) -> Callable[..., object]:
    """A replacement for torch.compile that does not compile."""
    return function if function is not None else (lambda wrapped: wrapped)


@cache
def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed; does not import it."""
    return find_spec("bitsandbytes") is not None


def packed_shapes(
    shape: tuple[int, int], quantization: str, double_quantization: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes of the tensors that `pack` returns for an (O, I) matrix, by name."""
    out_features, in_features = shape
    if quantization not in FOUR_BIT:
        kind = torch.uint8 if quantization == "fp8" else torch.int8
        return {"packed": (shape, kind), "absmax": ((out_features,), torch.float32)}
    elements = out_features * in_features
    blocks = -(-elements // BLOCK)
    packed = (-(-elements // 2), 1), torch.uint8
    if not double_quantization:
        return {"packed": packed, "absmax": ((blocks,), torch.float32)}
    nested, offset = ((-(-blocks // NESTED_BLOCK),), torch.float32), ((), torch.float32)
    return {"packed": packed, "absmax": ((blocks,), torch.uint8), "nested_absmax": nested, "offset": offset}


def pack(matrix: Tensor, quantization: str, double_quantization: bool) -> Tensors:
    """Pack a dense (O, I) matrix. The same matrix gives the same bytes on every device: 4 bits are packed on the CPU,
    because bitsandbytes' GPU kernels round differently. Raises: ModelError for the blocks of a GGUF file."""
    if quantization not in (*FOUR_BIT, *EIGHT_BIT, "fp8"):
        raise ModelError(
            f"tunekit can read {quantization} blocks, but cannot write them", "merge with --onto dequantized"
        )
    matrix = matrix.detach().contiguous()  # (O, I)
    if quantization in EIGHT_BIT:
        return _pack_rows(matrix)
    if quantization == "fp8":
        return fp8.pack(matrix)
    packed = four_bit.pack(matrix.cpu(), quantization, double_quantization)
    return {name: tensor.to(matrix.device) for name, tensor in packed.items()}


def _pack_rows(matrix: Tensor) -> Tensors:
    """Pack to int8 with one float32 scale per row: q = round(127 w / absmax(row)), as in LLM.int8. A few rows are
    processed at a time."""
    packed = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)  # (O, I)
    absmax = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)  # (O,)
    rows = max(1, four_bit.CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    for first in range(0, matrix.shape[0], rows):
        part = slice(first, first + rows)
        scaled, absmax[part] = fp8.scaled_rows(matrix[part], 127.0)
        packed[part] = scaled.round_()
    return {"packed": packed, "absmax": absmax}


def unpack(tensors: Mapping[str, Tensor], shape: tuple[int, int], quantization: str, dtype: torch.dtype) -> Tensor:
    """Unpack to the dense (O, I) matrix in `dtype`. On the meta device, the result is a meta tensor of that shape."""
    packed = tensors["packed"]
    if "absmax" not in tensors:
        return blocks.unpack(packed, shape, quantization, dtype)
    absmax = tensors["absmax"]
    if quantization in EIGHT_BIT:
        return packed.to(dtype).mul_((absmax / 127.0)[:, None])  # one rounding: 8 bits fit every dtype
    if quantization == "fp8":
        return fp8.unpack(packed, absmax, dtype)
    # Flat, because the blocks run over the flattened matrix; a kernel for rows would misplace them at row ends.
    elements = shape[0] * shape[1]
    if packed.device.type in ("cpu", "meta") or not kind_of(packed.device).bitsandbytes or not has_bitsandbytes():
        return four_bit.unpack(tensors, elements, quantization, dtype).reshape(shape)
    import_bitsandbytes()
    operations = torch.ops.bitsandbytes
    if "nested_absmax" in tensors:
        code, nested = four_bit.nested_values(absmax.device), tensors["nested_absmax"]  # (256,), (blocks / 256,)
        absmax = operations.dequantize_blockwise.default(absmax, nested, code, NESTED_BLOCK, torch.float32)  # (blocks,)
        absmax = absmax + tensors["offset"]
    dense = operations.dequantize_4bit.default(packed, absmax, BLOCK, quantization, (elements,), dtype)
    return dense.reshape(shape)


def fused_product(
    x: Tensor, tensors: Tensors, shape: tuple[int, int], quantization: str, bias: Tensor | None
) -> Tensor | None:
    """Multiply x (..., I) by a 4-bit (O, I) matrix -> (..., O), with bitsandbytes' fused kernel. The kernel decides by
    the number of rows of x whether to unpack the matrix first.

    None if the device has no such kernel, or if a block of weights continues in the next row of the matrix.
    """
    bits = quantization in FOUR_BIT and shape[1] % BLOCK == 0
    if not bits or x.device.type in ("cpu", "meta") or not kind_of(x.device).bitsandbytes or not has_bitsandbytes():
        return None
    import_bitsandbytes()
    named, absmax = dict[str, Tensor](), tensors["absmax"]
    if "nested_absmax" in tensors:
        named = {
            "absmax_8bit": absmax,
            "absmax_code": four_bit.nested_values(x.device),
            "absmax_offset": tensors["offset"],
        }
        absmax = tensors["nested_absmax"]
    gemm: Callable[..., Tensor] = torch.ops.bitsandbytes.gemm_4bit.default
    return gemm(x, tensors["packed"], shape, absmax, BLOCK, quantization, bias, **named)


def outlier_product(x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Product of LLM.int8: x (N, I) times packed (O, I) -> (N, O). Columns of x with a magnitude of `threshold` or more
    are not rounded to int8."""
    if x.is_meta:
        return _meta_product(x, packed, absmax)
    functional = import_bitsandbytes().functional
    quantized, scales, outliers = functional.int8_vectorwise_quant(x.to(torch.float16), threshold=threshold)
    product: Callable[..., tuple[Tensor, Tensor]] = torch.ops.bitsandbytes.int8_mixed_scaled_mm
    output, _ = product(x, quantized, packed, scales, absmax, outliers, bias)
    return output


def _meta_product(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    """The product of LLM.int8 on the meta device, (N, O). It makes the same allocations as bitsandbytes on a CPU, so
    that a memory forecast counts them.

    Source: bitsandbytes/backends/cpu/ops.py (int8_linear_matmul), backends/default/ops.py (int8_mm_dequant).
    """
    half = x.to(torch.float16)  # (N, I)
    quantized = half.to(torch.int8)  # (N, I)
    scales = torch.empty(quantized.shape[0], 1, dtype=torch.float32, device="meta")  # (N, 1)
    integers = torch._int_mm(quantized, packed.t())  # (N, O) int32
    return (integers * (scales * absmax[None]) * 1.0).to(x.dtype)


def saved_form(matrix: Tensor, quantization: str, double_quantization: bool) -> Tensors:
    """Pack a (O, I) matrix to 4 bits as transformers saves it. Returns the tensors by the suffix that follows the
    weight's name in the file."""
    tensors = pack(matrix, quantization, double_quantization)
    facts: dict[str, object] = {"quant_type": quantization, "blocksize": BLOCK}
    facts |= {"dtype": str(matrix.dtype).removeprefix("torch."), "shape": list(matrix.shape)}
    saved = {"": tensors["packed"], ".absmax": tensors["absmax"]}
    saved[".quant_map"] = four_bit.values_of(quantization).clone()
    if double_quantization:
        saved |= {".nested_absmax": tensors["nested_absmax"], ".nested_quant_map": four_bit.nested_values().clone()}
        offset = float(tensors["offset"])
        facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = torch.tensor(list(json.dumps(facts).encode("utf-8")), dtype=torch.uint8)
    return saved | {f".quant_state.bitsandbytes__{quantization}": text}


def tensors_of_state(packed: Tensor, state: QuantState) -> tuple[Tensors, str]:
    """Convert a weight packed by bitsandbytes to tunekit's named tensors. Returns the tensors and the quantization.

    Raises: ModelError for a block size that tunekit does not support.
    """
    if state.blocksize != BLOCK or (state.nested and state.state2.blocksize != NESTED_BLOCK):
        raise ModelError(f"4-bit weights in blocks of {state.blocksize} cannot be read", f"use blocks of {BLOCK}")
    codes = packed.contiguous().view(torch.uint8)  # bnb_4bit_quant_storage may name another dtype for the same bytes
    tensors = {"packed": codes.reshape(-1, 1), "absmax": state.absmax}
    if state.nested:
        tensors |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
    return tensors, str(state.quant_type)
