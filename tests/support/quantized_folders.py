"""Folders whose files store quantized weights, made from dense ones by plain code, with the numbers that they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.architectures.tiny import write_tiny

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
MATRIX = re.compile(r"layers\..*_proj\.weight$")
Tensors = dict[str, Tensor]
# a matrix -> the tensors that are stored instead, by ending, and the numbers that they mean, in float32
Store = Callable[[Tensor], tuple[Tensors, Tensor]]


def block_numbers(shape: torch.Size, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """For each place of a matrix, the row and the column of its block; the blocks at the edge may be smaller."""
    return torch.arange(shape[0])[:, None] // rows, torch.arange(shape[1])[None] // columns


def in_blocks(matrix: Tensor, rows: int, columns: int, top: float) -> tuple[Tensor, Tensor]:
    """The matrix divided by the scale of its block, and the scales."""
    row, column = block_numbers(matrix.shape, rows, columns)
    count = ceil(matrix.shape[1] / columns)
    scales = torch.zeros(ceil(len(matrix) / rows) * count)
    places = (row * count + column).expand(matrix.shape).flatten()
    scales = scales.scatter_reduce(0, places, matrix.abs().flatten(), "amax").reshape(-1, count) / top
    return matrix / scales[row, column], scales


def meant(numbers: Tensor, scales: Tensor, rows: int, columns: int, zeros: Tensor | None = None) -> Tensor:
    """(number - zero point) * scale, each with the scale of its block."""
    row, column = block_numbers(numbers.shape, rows, columns)
    offsets = 0 if zeros is None else zeros[row, column]
    return (numbers.float() - offsets) * scales.float()[row, column]


def fp8_blocks(rows: int, columns: int, *, exponents: bool = False) -> Store:
    def store(matrix: Tensor) -> tuple[Tensors, Tensor]:
        scaled, scales = in_blocks(matrix, rows or len(matrix), columns or matrix.shape[1], 448.0)
        if exponents:
            bytes_ = (scales.log2().ceil() + 127).to(torch.uint8)
            scaled, scales = scaled * 0.5, (bytes_.float() - 127).exp2()
        codes = scaled.to(torch.float8_e4m3fn)
        stored = bytes_ if exponents else scales if rows else scales.reshape(())
        values = meant(codes, scales, rows or len(matrix), columns or matrix.shape[1])
        return {"weight": codes, "weight_scale_inv": stored}, values

    return store


def compressed_fp8(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Store:
    def store(matrix: Tensor) -> tuple[Tensors, Tensor]:
        size = rows or len(matrix), columns or matrix.shape[1]
        scaled, scales = in_blocks(matrix, *size, 448.0)
        codes, scales = scaled.to(torch.float8_e4m3fn), scales.to(dtype)
        values = meant(codes, scales, *size).to(dtype).float()
        return {"weight": codes, "weight_scale": scales if rows else scales.reshape(1)}, values

    return store


def compressed_int8(matrix: Tensor) -> tuple[Tensors, Tensor]:
    scaled, scales = in_blocks(matrix, 1, matrix.shape[1], 127.0)
    codes, scales = scaled.round().to(torch.int8), scales.bfloat16()
    return {"weight": codes, "weight_scale": scales}, meant(codes, scales, 1, matrix.shape[1]).bfloat16().float()


def packed(numbers: Tensor, bits: int = 4) -> Tensor:
    """Unsigned numbers (R, C) packed along the rows into words of 32 bits, number by number."""
    each = 32 // bits
    words = torch.zeros(len(numbers), ceil(numbers.shape[1] / each), dtype=torch.int64)
    for column in range(numbers.shape[1]):
        words[:, column // each] |= numbers[:, column].long() << (bits * (column % each))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def compressed_int4(group: int, *, symmetric: bool) -> Store:
    def store(matrix: Tensor) -> tuple[Tensors, Tensor]:
        scaled, scales = in_blocks(matrix, 1, group, 7.0)
        codes, scales = scaled.round().clamp(-8, 7).to(torch.int8), scales.bfloat16()
        zeros = None if symmetric else torch.randint(-8, 8, scales.shape)
        values = meant(codes, scales, 1, group, zeros).bfloat16().float()
        stored = {
            "weight_packed": packed(codes + 8),
            "weight_scale": scales,
            "weight_shape": torch.tensor(matrix.shape),
        }
        if zeros is not None:
            stored["weight_zero_point"] = packed((zeros + 8).t()).t().contiguous()
        return stored, values

    return store


def fp4_codes(scaled: Tensor) -> Tensor:
    """The number of the nearest of the 16 values."""
    middles = (FP4[1:8] + FP4[:7]) / 2
    return (torch.bucketize(scaled.abs(), middles) + 8 * (scaled < 0)).to(torch.uint8)


def nvfp4(matrix: Tensor) -> tuple[Tensors, Tensor]:
    whole = torch.tensor([448.0 * 6.0 / float(matrix.abs().max())])
    _, scales = in_blocks(matrix, 1, 16, 6.0)
    scales = (scales * whole).to(torch.float8_e4m3fn)
    real = scales.float() / whole
    codes = fp4_codes(matrix / real.repeat_interleave(16, 1).clamp_min(1e-9))
    bytes_ = codes[:, ::2] | codes[:, 1::2] << 4
    values = meant(FP4[codes.long()], real, 1, 16).bfloat16().float()
    return {"weight_packed": bytes_, "weight_scale": scales, "weight_global_scale": whole}, values


def awq(group: int) -> Store:
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: the place i of a word has the number order[i] of its eight

    def words(numbers: Tensor) -> Tensor:
        shuffled = numbers.reshape(len(numbers), -1, 8)[:, :, list(order)].reshape(len(numbers), -1)
        return packed(shuffled)

    def store(matrix: Tensor) -> tuple[Tensors, Tensor]:
        turned = matrix.t().contiguous()  # (I, O)
        size = group if group > 0 else len(turned)
        _, scales = in_blocks(turned, size, 1, 7.0)
        scales = scales.half()
        zeros = torch.randint(4, 12, scales.shape)
        spread = scales.float().repeat_interleave(size, 0)[: len(turned)]
        codes = (turned / spread + zeros.repeat_interleave(size, 0)[: len(turned)]).round().clamp(0, 15)
        values = meant(codes, scales, size, 1, zeros).half().float()
        return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}, values.t().contiguous()

    return store


def compressed(format_: str, **weights: Any) -> dict[str, Any]:
    """The settings of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}}
    facts = {"quant_method": "compressed-tensors", "format": format_, "quantization_status": "compressed"}
    return facts | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FLOAT8, INT4 = {"type": "float", "num_bits": 8}, {"type": "int", "num_bits": 4, "group_size": 32, "strategy": "group"}
FORMATS: dict[str, tuple[Store, dict[str, Any]]] = {
    "fp8-blocks": (fp8_blocks(128, 128), FP8 | {"weight_block_size": [128, 128]}),
    "fp8-small-blocks": (fp8_blocks(32, 48), FP8 | {"weight_block_size": [32, 48]}),
    "fp8-tensor": (fp8_blocks(0, 0), FP8 | {"activation_scheme": "static", "weight_block_size": None}),
    "fp8-exponents": (
        fp8_blocks(1, 32, exponents=True),
        {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    ),
    "compressed-fp8-tensor": (compressed_fp8(0, 0), compressed("float-quantized", **FLOAT8, strategy="tensor")),
    "compressed-fp8-channel": (compressed_fp8(1, 0), compressed("float-quantized", **FLOAT8, strategy="channel")),
    "compressed-fp8-block": (
        compressed_fp8(128, 128, torch.float32),
        compressed("float-quantized", **FLOAT8, strategy="block", block_structure=[128, 128]),
    ),
    "compressed-int8": (compressed_int8, compressed("int-quantized", type="int", num_bits=8, strategy="channel")),
    "compressed-int4": (compressed_int4(32, symmetric=True), compressed("pack-quantized", **INT4)),
    "compressed-int4-zeros": (
        compressed_int4(32, symmetric=False),
        compressed("pack-quantized", **INT4 | {"symmetric": False}),
    ),
    "compressed-nvfp4": (
        nvfp4,
        compressed("nvfp4-pack-quantized", type="float", num_bits=4, group_size=16, strategy="tensor_group"),
    ),
    "awq": (awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "awq-columns": (awq(-1), {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "GEMM"}),
}


def write_quantized(dense: Path, folder: Path, name: str, **more: Any) -> Tensors:
    """Write the model of the folder `dense` with its layers stored in the format `name`. Returns what every tensor
    means, by its dense name. `more`: further keys of config.json."""
    store, settings = FORMATS[name]
    stored, values = dict[str, Tensor](), dict[str, Tensor]()
    torch.manual_seed(1)
    for key, tensor in load_file(dense / "model.safetensors").items():
        if not MATRIX.search(key):
            stored[key] = values[key] = tensor
            continue
        parts, values[key] = store(tensor.float())
        stored |= {key.removesuffix("weight") + ending: part for ending, part in parts.items()}
    write_folder(dense, folder, stored, **{"quantization_config": settings, **more})
    return values


def write_mxfp4(folder: Path) -> Tensors:
    """A tiny gpt-oss whose experts are stored as MXFP4. Returns what every tensor means."""
    dense = folder.parent / f"{folder.name}-dense"
    write_tiny("gpt_oss", dense)
    stored, values = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in load_file(dense / "model.safetensors").items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = values[key] = tensor
            continue
        experts, columns, rows = tensor.shape
        flat = tensor.float().transpose(1, 2).reshape(-1, columns)  # (E R, C)
        _, scales = in_blocks(flat, 1, 32, 6.0)
        exponents = scales.log2().ceil()
        codes = fp4_codes(flat / exponents.exp2().repeat_interleave(32, 1))
        blocks = codes[:, ::2] | codes[:, 1::2] << 4
        stored[f"{key}_blocks"] = blocks.reshape(experts, rows, columns // 32, 16)
        stored[f"{key}_scales"] = (exponents + 127).to(torch.uint8).reshape(experts, rows, columns // 32)
        meaning = meant(FP4[codes.long()], exponents.exp2(), 1, 32).reshape(experts, rows, columns)
        values[key] = meaning.transpose(1, 2).contiguous()
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    write_folder(dense, folder, stored, quantization_config=settings)
    return values


def write_folder(dense: Path, folder: Path, tensors: Tensors, **more: Any) -> None:
    """A copy of the folder `dense` with other tensors, and more keys in config.json."""
    folder.mkdir(parents=True)
    for path in dense.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((dense / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps(config))
