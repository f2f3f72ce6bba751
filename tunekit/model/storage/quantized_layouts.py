"""Finds the quantized weights of a model folder from its config.json and the headers of its files, for each method of
quantization that tunekit reads. No weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from tunekit.errors import ModelError
from tunekit.files.tensors import TensorEntry
from tunekit.model.quantized import checkpoint_formats as formats
from tunekit.model.storage.mapped_files import MappedFiles
from tunekit.model.storage.quantized_files import AGAIN, QuantizedFiles, QuantizedWeight
from tunekit.model.storage.shards import read_headers
from tunekit.model.storage.source import read_json
from tunekit.records import JsonObject

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SCALES}
# Endings of tensors that belong to a quantized weight. None of them may remain.
OF_WEIGHTS = (
    *("_scale_inv", ".qscale_weight", "_blocks", "_scales", ".qweight", ".qzeros", ".scales", ".weight_packed"),
    *(".weight_scale", ".weight_zero_point", ".weight_global_scale", ".weight_shape", ".weight_g_idx"),
)
UNQUANTIZED = "choose the unquantized base"

NamedWeights = Iterator[tuple[str, QuantizedWeight]]  # name of the dense weight, and how it is stored


def stored_settings(config: JsonObject) -> JsonObject | None:
    """The settings with which a folder's weights are quantized, from its config.json or from the configuration of the
    text model inside; None if there are none. mlx-lm calls them `quantization`."""
    parts = [config, *(part for name, part in config.items() if name.endswith("_config") and isinstance(part, dict))]
    names = ("quantization_config", "compression_config", "quantization")
    found = (part[name] for part in parts for name in names if isinstance(part.get(name), dict) and part[name])
    return next(found, None)


def without_settings(config: JsonObject) -> JsonObject:
    """A copy of the configuration for dense weights."""
    return {
        name: without_settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in ("quantization_config", "compression_config")
    }


def open_weights(folder: Path) -> MappedFiles:
    """The tensors of a folder by name. Quantized weights are dequantized when they are read.

    Raises: ModelError for damaged files, and for weights that are quantized in an unknown way or without their scales.
    """
    files, path = MappedFiles(folder, read_headers(folder)), folder / "config.json"
    config = read_json(path) if path.exists() else JsonObject()
    settings = stored_settings(config) or {}
    method = METHODS.get(str(settings.get("quant_method")))
    layout = QuantizedLayout(files, settings)
    weights = dict(method(layout)) if method is not None else {}
    opened = QuantizedFiles(files, weights, _dense_dtype(config)) if weights else files
    if not settings or method is not None:
        layout.check_rest(opened.headers)
    return opened


def _dense_dtype(config: JsonObject) -> torch.dtype:
    """The dtype of the dense weights, as the configuration states it; bfloat16 if it does not."""
    parts = [config, *(part for part in [config.get("text_config")] if isinstance(part, dict))]
    stated = (str(part.get(name)) for part in parts for name in ("dtype", "torch_dtype"))
    return next((DTYPES[name] for name in stated if name in DTYPES), torch.bfloat16)


@dataclass(frozen=True)
class QuantizedLayout:
    """The stored tensors of a folder, and the settings of their quantization."""

    files: MappedFiles
    settings: JsonObject

    @property
    def headers(self) -> dict[str, TensorEntry]:
        return self.files.headers

    def refuse(self, name: str, what: str, how: str = AGAIN) -> NoReturn:
        """Raise the error about the tensor `name`."""
        raise ModelError(what, how, file=str(self.files.folder / self.headers[name].file))

    def refuse_settings(self, what: str, how: str = UNQUANTIZED) -> NoReturn:
        """Raise an error about the settings in config.json."""
        raise ModelError(what, how, file=str(self.files.folder / "config.json"), key="quantization_config")

    def partner(self, codes: str, *names: str) -> str:
        """The first of `names` that the files contain: the scales or zero points of the tensor `codes`."""
        if 0 in self.headers[codes].shape:
            self.refuse(codes, f"the tensor {codes} is empty")
        name = next((name for name in names if name in self.headers), None)
        return name or self.refuse(codes, f"the tensor {codes} is quantized, but the files contain no {names[0]}")

    def checked(self, weight: QuantizedWeight, zero_shape: tuple[int, ...] | None = None) -> QuantizedWeight:
        """The weight, if its scales and zero points have one number for each block, or one for each matrix.
        `zero_shape`: the shape of packed zero points."""
        shapes = {weight.scales: weight.grid, weight.zeros: zero_shape or weight.grid, weight.divisor: (1,)}
        shapes[weight.stated_shape] = (len(weight.shape),)
        for name, expected in shapes.items():
            shape = () if name is None else self.headers[name].shape
            single = expected[-2:] == (1, 1) and prod(shape) in (1, prod(expected))
            if name is not None and shape != expected and not single:
                block = f"blocks of {weight.block[0]} x {weight.block[1]}"
                what = f"the tensor {name} has the shape {list(shape)}, but {weight.codes} {list(weight.shape)}"
                self.refuse(name, f"{what} in {block} needs {list(expected)}")
        if not (kind := self.headers[weight.scales].dtype).is_floating_point and kind not in formats.EXPONENTS:
            self.refuse(weight.scales, f"the tensor {weight.scales} contains scales as {kind}, which is not read")
        return weight

    def check_rest(self, headers: dict[str, TensorEntry]) -> None:
        """Refuse tensors that would be read as dense weights, but are not."""
        for name, entry in headers.items():
            if self.headers.get(name) != entry:
                continue  # a dense weight
            if entry.dtype in FLOAT8:
                self.refuse(
                    name, f"the tensor {name} is stored as float8, and config.json does not say with which scales"
                )
            if self.settings and name.endswith(OF_WEIGHTS):
                self.refuse(name, f"the tensor {name} belongs to no quantized weight in these files")


def _fp8(layout: QuantizedLayout) -> NamedWeights:
    """Float8 weights with a scale for each block (DeepSeek, Qwen), or for the whole matrix (Mistral). An int8 weight
    contains two numbers of 4 bits in each byte, in groups of 32 (DeepSeek V4's experts)."""
    block = layout.settings.get("weight_block_size")
    if block is not None and not _is_block(block):
        layout.refuse_settings(f"weight_block_size is {block!r}, but it must be two whole numbers such as [128, 128]")
    for name, entry in list(layout.headers.items()):
        packed = entry.dtype == torch.int8
        if (entry.dtype not in FLOAT8 and not packed) or len(entry.shape) not in (2, 3):
            continue
        stem = name.removesuffix(".weight")
        scales = layout.partner(name, f"{name}_scale_inv", f"{stem}.scale", f"{stem}.qscale_weight", f"{name}_scale")
        shape = (*entry.shape[:-1], entry.shape[-1] * (2 if packed else 1))
        size = (1, 32) if packed else tuple(block or shape[-2:])
        numbers = formats.fp4_numbers if packed else formats.plain_numbers
        yield name, layout.checked(QuantizedWeight(name, scales, shape, (size[0], size[1]), numbers))


def _mxfp4(layout: QuantizedLayout) -> NamedWeights:
    """gpt-oss: experts (E, R, G, 16 bytes) of 4-bit numbers in groups of 32, which the net stores as (E, C, R)."""
    for codes, entry in layout.headers.items():
        if not codes.endswith("_blocks"):
            continue
        if len(entry.shape) != 4 or entry.dtype != torch.uint8 or entry.shape[3] != 16:
            what = f"the tensor {codes} is {entry.dtype} of the shape {list(entry.shape)}"
            layout.refuse(codes, f"{what}, but MXFP4 blocks are bytes of the shape [experts, rows, groups, 16]")
        name, (experts, rows, groups, _) = codes.removesuffix("_blocks"), entry.shape
        scales = layout.partner(codes, f"{name}_scales")
        shape = (experts, rows, 32 * groups)
        yield name, layout.checked(QuantizedWeight(codes, scales, shape, (1, 32), formats.fp4_numbers, transposed=True))


def _awq(layout: QuantizedLayout) -> NamedWeights:
    """AWQ (gemm): words of eight 4-bit numbers (I, O / 8), with scales (I / G, O) and packed zero points."""
    bits, group = layout.settings.get("bits", layout.settings.get("w_bit", 4)), layout.settings.get("group_size", 128)
    version = str(layout.settings.get("version", layout.settings.get("format", "gemm"))).lower()
    if bits != 4 or version != "gemm" or layout.settings.get("backend") == "llm-awq" or not isinstance(group, int):
        layout.refuse_settings(
            f"AWQ with bits {bits}, version {version} and group_size {group} is not read (only gemm)"
        )
    for codes, entry in layout.headers.items():
        stem = codes.removesuffix(".qweight")
        if stem == codes:
            continue
        if len(entry.shape) != 2 or entry.dtype != torch.int32:
            layout.refuse(
                codes, f"the tensor {codes} is {entry.dtype} of the shape {list(entry.shape)}, not int32 [I, O]"
            )
        scales, zeros = layout.partner(codes, f"{stem}.scales"), layout.partner(codes, f"{stem}.qzeros")
        shape = (entry.shape[0], 8 * entry.shape[1])
        weight = QuantizedWeight(
            *(codes, scales, shape, (group if group > 0 else shape[0], 1), formats.awq_integers),
            rounding=layout.headers[scales].dtype,
            transposed=True,
            zeros=zeros,
            unpack_zeros=formats.awq_integers,
        )
        yield f"{stem}.weight", layout.checked(weight, (weight.grid[0], entry.shape[1]))


def _compressed_tensors(layout: QuantizedLayout) -> NamedWeights:
    """compressed-tensors: float8, int8, packed integers and 4-bit floats, with scales of several shapes."""
    schemes = _schemes(layout)
    for codes, entry in layout.headers.items():
        stem = codes.removesuffix("_packed")
        dtypes = (*FLOAT8, torch.int8) if stem == codes else (torch.int32, torch.uint8)
        if not stem.endswith("weight") or entry.dtype not in dtypes or len(entry.shape) != 2:
            continue
        if f"{stem}_g_idx" in layout.headers:
            layout.refuse(
                codes, f"the columns of {codes} are in the order of {stem}_g_idx, which is not read", UNQUANTIZED
            )
        scales = layout.partner(codes, f"{stem}_scale")
        fitting = (
            each for each in schemes if each.type == ("int" if entry.dtype in (torch.int8, torch.int32) else "float")
        )
        weights = [_compressed(layout, codes, stem, scales, scheme) for scheme in fitting]
        if not weights:
            layout.refuse(codes, f"no group of config_groups in config.json fits {codes}, which is {entry.dtype}")
        shape = layout.headers[scales].shape
        weight = next((weight for weight in weights if weight.grid == shape), weights[0])
        packed = weight.zeros is not None and layout.headers[weight.zeros].dtype == torch.int32
        words = ceil(weight.grid[0] * entry.shape[1] / weight.shape[1])  # zero points are packed along the rows
        yield stem, layout.checked(weight, (words, weight.grid[1]) if packed else None)


@dataclass(frozen=True)
class _Scheme:
    """How a group of weights is quantized. `block`: rows and columns that share a scale; 0 means all of them."""

    type: str
    bits: int
    block: tuple[int, int]


def _schemes(layout: QuantizedLayout) -> list[_Scheme]:
    """The schemes in config_groups. Raises: ModelError for an unknown scheme, and for rotated or sparse weights."""
    sparsity = layout.settings.get("sparsity_config") or {}
    if layout.settings.get("transform_config") or sparsity.get("format", "dense") != "dense":
        layout.refuse_settings(
            "the weights are rotated or sparse (transform_config, sparsity_config), which is not read"
        )
    groups = layout.settings.get("config_groups")
    parts = [part.get("weights") for part in groups.values()] if isinstance(groups, dict) else []
    return [_scheme(layout, part) for part in parts if isinstance(part, dict)]


def _scheme(layout: QuantizedLayout, settings: JsonObject) -> _Scheme:
    kind, bits, size = settings.get("type", "int"), settings.get("num_bits", 8), settings.get("group_size")
    strategy, block = settings.get("strategy"), settings.get("block_structure")
    if isinstance(block, str):
        block = [int(side) for side in block.split("x") if side.isdecimal()]
    columns = size if isinstance(size, int) and size > 0 else None
    strategy = strategy or ("group" if columns else "channel" if size == -1 else "tensor")
    blocks = {"tensor": (0, 0), "channel": (1, 0)}
    if columns:
        blocks |= {"group": (1, columns), "tensor_group": (1, columns)}
    if block is not None and _is_block(block):
        blocks["block"] = (block[0], block[1])
    if (kind, bits) not in (("int", 8), ("int", 4), ("float", 8), ("float", 4)) or strategy not in blocks:
        what = f"compressed-tensors with {kind} of {bits} bits, strategy {strategy}, group_size {size}"
        layout.refuse_settings(f"{what} and block_structure {block} is not read")
    return _Scheme(kind, bits, blocks[strategy])


def _compressed(layout: QuantizedLayout, codes: str, stem: str, scales: str, scheme: _Scheme) -> QuantizedWeight:
    """The weight whose codes are `codes`, if it is quantized by `scheme`."""
    entry = layout.headers[codes]
    bits = {torch.int32: scheme.bits, torch.uint8: 4}.get(entry.dtype, 8 * entry.dtype.itemsize)
    rows, columns = entry.shape[0], entry.shape[1] * 8 * entry.dtype.itemsize // bits
    size = scheme.block[0] or rows, scheme.block[1] or columns
    zeros, divisor, stated = (f"{stem}_{name}" for name in ("zero_point", "global_scale", "shape"))
    kind = layout.headers[scales].dtype
    numbers: formats.Unpacking = formats.plain_numbers
    unpack_zeros: formats.Unpacking = formats.plain_numbers
    if entry.dtype == torch.int32:
        numbers = formats.packed_integers(bits, is_signed=True)
    elif entry.dtype == torch.uint8:
        numbers = formats.fp4_numbers
    if zeros in layout.headers and layout.headers[zeros].dtype == torch.int32:  # packed along the rows
        unpack_zeros = partial(_unpack_rows, numbers, ceil(rows / size[0]))
    return QuantizedWeight(
        *(codes, scales, (rows, columns), size, numbers),
        rounding=kind if kind in SCALES else torch.bfloat16,
        zeros=zeros if zeros in layout.headers else None,
        unpack_zeros=unpack_zeros,
        divisor=divisor if divisor in layout.headers else None,
        stated_shape=stated if stated in layout.headers else None,
    )


def _unpack_rows(numbers: formats.Unpacking, rows: int, words: Tensor) -> Tensor:
    """Unpack a matrix whose columns are packed into words: (words, C) -> (rows, C)."""
    return numbers(words.t()).t()[:rows]


def _is_block(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


METHODS: dict[str, Callable[[QuantizedLayout], NamedWeights]] = {
    "fp8": _fp8,
    "mxfp8": _fp8,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
