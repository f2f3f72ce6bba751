"""Packs and unpacks NF4 and FP4 with torch operations on a CPU. The bits are the same as bitsandbytes'.

Each block of 64 numbers is divided by its largest magnitude (the block's scale), and each number is rounded to the
nearest of 16 values. A byte contains the codes of two values, the first in the high half. Double quantization also
packs the scales, after their mean is subtracted: 256 scales share a second scale, and are rounded to the nearest of 256
values. Source: Dettmers et al. 2023 (QLoRA), section 3.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from tunekit.contracts import Tensors

BLOCK = 64  # elements that share one scale
NESTED_BLOCK = 256  # scales that share a second scale, with double quantization
CHUNK_ELEMENTS = 2**18  # processed at a time, so that intermediate results stay in the cache
WORKING_BYTES = 8 * 4 * CHUNK_ELEMENTS  # maximum of working memory beyond a matrix and its packed tensors
HALF_STEPS = 32767.5
SMALLEST_SCALE = 1e-38  # minimum divisor of a block
ALWAYS_ABOVE = 9.0  # a bound that no scaled number reaches
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4_VALUES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # divided by 12; the other eight values are their negatives


@cache
def values_of(quantization: str) -> Tensor:
    """(16,) float32: the value of each 4-bit code, before multiplication by the scale of its block."""
    if quantization == "nf4":
        return torch.tensor(NF4_VALUES, dtype=torch.float32)
    positive = torch.tensor(FP4_VALUES, dtype=torch.float32) / max(FP4_VALUES)
    return torch.cat([positive, 0.0 - positive])  # the second zero is positive too


@cache
def nested_values(device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008
    """(256,) float32, ascending: the value of each code of a packed scale, before multiplication by the second scale.
    Cached per device.

    The values are 0, 1, and seven decades with both signs. A decade is divided into equal steps, whose middles are the
    values. Each decade has twice as many steps as the next smaller decade. Source: Dettmers 2015, 8-bit approximations
    for parallelism in deep learning.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        levels += middles + [-value for value in middles]
    return torch.tensor(sorted(levels), dtype=torch.float32).to(device)


def pack(matrix: Tensor, quantization: str, double_quantization: bool) -> Tensors:
    """Pack a contiguous matrix on the CPU. Returns tensors with the names of codec.packed_shapes."""
    flat = matrix.reshape(-1)
    elements = flat.numel()
    packed = torch.empty(-(-elements // 2), 1, dtype=torch.uint8)
    absmax = torch.empty(-(-elements // BLOCK), dtype=torch.float32)  # (blocks,)
    for first in range(0, elements, CHUNK_ELEMENTS):
        part = flat[first : first + CHUNK_ELEMENTS].float()
        scaled = _scaled(part, absmax[first // BLOCK : -(-(first + part.numel()) // BLOCK)])
        packed[first // 2 : (first + scaled.numel()) // 2, 0] = _halves(scaled, quantization)
    if not double_quantization:
        return {"packed": packed, "absmax": absmax}
    offset = absmax.mean()
    nested, nested_absmax = _pack_scales(absmax - offset)
    return {"packed": packed, "absmax": nested, "nested_absmax": nested_absmax, "offset": offset}


def _scaled(part: Tensor, absmax: Tensor) -> Tensor:
    """Divide (n,) float32 numbers by the largest magnitude in their block, and write these magnitudes to `absmax`. The
    result is padded to an even number of elements.

    Like bitsandbytes, this multiplies complete blocks by the inverse, but divides an incomplete last block.
    """
    blocks_end = part.numel() // BLOCK * BLOCK
    blocks = part[:blocks_end].view(-1, BLOCK)
    torch.amax(blocks.abs(), dim=1, out=absmax[: len(blocks)])
    inverse = 1.0 / absmax[: len(blocks)].clamp(min=SMALLEST_SCALE)
    scaled = (blocks * inverse[:, None]).clamp_(-1, 1).view(-1)
    if blocks_end == part.numel():
        return scaled
    remainder = part[blocks_end:]
    absmax[-1] = remainder.abs().max().clamp(min=SMALLEST_SCALE)
    padding = scaled.new_zeros(part.numel() % 2)
    return torch.cat([scaled, (remainder / absmax[-1]).clamp_(-1, 1), padding])


@cache
def _rounding_tables(quantization: str) -> tuple[Tensor, Tensor, Tensor]:
    """Three tables for rounding float32 numbers to the nearest of the 16 values, by the upper 16 bits of a number. A
    search among the 15 bounds between the values would take ten times as long.

    (65536,): how many bounds are below all numbers with these upper bits. (65536,): the only bound that can be between
    such numbers. (256,): the byte with two codes, for each byte with the ranks of two values.
    """
    values = values_of(quantization)
    order = torch.argsort(values)  # rank -> half byte; NF4's values are in order
    bounds = (values[order[:-1]] + values[order[1:]]) / 2  # (15,)
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    edges = torch.stack([upper, upper | 0xFFFF]).to(torch.int32).view(torch.float32)  # (2, 65536)
    edges[:, (upper >> 16 & 0x7FFF) >= 0x7F80] = ALWAYS_ABOVE  # NaN and infinity
    lowest, highest = edges.aminmax(dim=0)
    below = torch.bucketize(lowest, bounds)
    if int((torch.bucketize(highest, bounds) - below).max()) > 1:
        raise AssertionError("two rounding bounds have the same upper 16 bits")
    bound = torch.cat([bounds, torch.tensor([ALWAYS_ABOVE])])[below]
    ranks = torch.arange(256)
    return below.float(), bound, ((order[ranks >> 4 & 15] << 4) | order[ranks & 15]).to(torch.uint8)


def _halves(scaled: Tensor, quantization: str) -> Tensor:
    """Round (n,) numbers from -1 to 1 to the nearest of the 16 values, or to the lower value if two are equally near.
    Returns bytes with two codes each, (n / 2,)."""
    below, bound, recoded = _rounding_tables(quantization)
    cell = scaled.view(torch.uint16)[1::2].to(torch.int32)  # (n,) upper halves; the machine is little-endian
    bounds = torch.index_select(bound, 0, cell)
    ranks = torch.index_select(below, 0, cell).add_(torch.gt(scaled, bounds, out=bounds)).to(torch.uint8)
    pairs = ranks.view(torch.int16)  # the first in the low byte
    bytes_of_ranks = ((pairs << 4) | (pairs >> 8)).to(torch.uint8)
    return bytes_of_ranks if quantization == "nf4" else torch.index_select(recoded, 0, bytes_of_ranks.to(torch.int32))


@cache
def _nearest_nested() -> Tensor:
    """(65536,) int32: for numbers in equal steps from -1 to 1, the index of the nearest of the 256 values."""
    values, steps = nested_values(), torch.arange(2**16).float() / HALF_STEPS - 1.0
    right = torch.searchsorted(values, steps).clamp_(1, len(values) - 1)
    left = right - 1
    return torch.where(values[right] - steps < steps - values[left], right, left).to(torch.int32)


def _pack_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Pack scales: (blocks,) float32 -> codes (blocks,) uint8 and magnitudes (blocks / 256,) float32.

    A scale is first rounded to one of 65536 equal steps, as in bitsandbytes 0.50 on a CPU.
    """
    blocks = -(-scales.numel() // NESTED_BLOCK)
    padded = torch.nn.functional.pad(scales, (0, blocks * NESTED_BLOCK - scales.numel())).view(blocks, NESTED_BLOCK)
    absmax = padded.abs().amax(dim=1)  # (blocks,)
    normed = (padded * (1.0 / absmax)[:, None]).clamp_(-1, 1).view(-1)[: scales.numel()]
    steps = torch.nan_to_num(normed, nan=-1.0).add_(1.0).mul_(HALF_STEPS).add_(0.5).to(torch.int32)
    return torch.index_select(_nearest_nested(), 0, steps).to(torch.uint8), absmax


def unpack(tensors: Mapping[str, Tensor], elements: int, quantization: str, dtype: torch.dtype) -> Tensor:
    """Unpack (elements,) numbers: value times scale in float32, rounded once to `dtype`.

    On the meta device, this only makes the same allocations, so that a memory forecast counts them.
    """
    packed, absmax = tensors["packed"].reshape(-1), _scales(tensors)
    dense = torch.empty(elements, dtype=dtype, device=packed.device)
    blocks_end = elements // BLOCK * BLOCK
    chunk = min(CHUNK_ELEMENTS, blocks_end)
    index = torch.empty(chunk // 2, dtype=torch.int32, device=packed.device)
    looked_up = torch.empty(chunk // 2, dtype=torch.int64, device=packed.device)
    if packed.is_meta:
        return dense
    pairs = _pairs(quantization, packed.device)
    for first in range(0, blocks_end, CHUNK_ELEMENTS):
        count = min(CHUNK_ELEMENTS, blocks_end - first)
        places, values = index[: count // 2], looked_up[: count // 2]
        places.copy_(packed[first // 2 : (first + count) // 2])
        torch.index_select(pairs, 0, places, out=values)
        numbers = values.view(torch.float32).view(-1, BLOCK)
        scales, out = absmax[first // BLOCK : (first + count) // BLOCK, None], dense[first : first + count]
        if dtype == torch.float32:
            torch.mul(numbers, scales, out=out.view(-1, BLOCK))
        else:
            out.view(-1, BLOCK).copy_(numbers.mul_(scales))
    if blocks_end < elements:
        remainder = torch.index_select(pairs, 0, packed[blocks_end // 2 :].to(torch.int32)).view(torch.float32)
        dense[blocks_end:] = remainder[: elements - blocks_end] * absmax[-1]
    return dense


@cache
def _pairs(quantization: str, device: torch.device) -> Tensor:
    """(256,) int64: for each byte, its two values as the bits of two float32 numbers, so that one look-up unpacks both.
    Cached per device."""
    values, byte = values_of(quantization), torch.arange(256)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int64).reshape(-1).to(device)


def _scales(tensors: Mapping[str, Tensor]) -> Tensor:
    """The float32 scale of each block, (blocks,). Double-quantized scales are unpacked first."""
    absmax = tensors["absmax"]
    if "nested_absmax" not in tensors:
        return absmax
    nested = tensors["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
    values = nested_values(absmax.device)
    return torch.index_select(values, 0, absmax.to(torch.int32)).mul_(nested).add_(tensors["offset"])
