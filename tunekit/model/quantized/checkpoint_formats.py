"""Dequantizes weights in the checkpoints of other programs: value = (number - zero point) * scale.

Each block of a matrix has one scale. A block is a whole matrix, a row, a group of columns, or a rectangle. Blocks at
the lower and right edge may be smaller. FP8, MXFP4, NVFP4, packed integers and AWQ differ in how they store a number.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the other eight codes are the same values with a minus sign
EXPONENT_BIAS = 127  # a scale that is stored as a byte is 2 ** (byte - 127)
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each of eight numbers in a word of 32 bits, from its lowest bits on

Unpacking = Callable[[Tensor], Tensor]  # stored codes (N, bytes or words) -> numbers (N, columns) float32


def dequantized(numbers: Tensor, scales: Tensor, zeros: Tensor | None, block_columns: int) -> Tensor:
    """Compute rows of a matrix, (N, C) float32, from the numbers and from the scales and zero points of these rows.

    Shapes: numbers (N, C), scales and zeros (N, ceil(C / block_columns)).
    """
    columns = numbers.shape[1]
    if zeros is not None:
        numbers = numbers - _spread(zeros, block_columns, columns)
    return numbers * _spread(scales, block_columns, columns)


def _spread(blocks: Tensor, block_columns: int, columns: int) -> Tensor:
    """Repeat the value of each block for all its columns: (N, blocks) -> (N, columns), or (N, 1) for one block."""
    return blocks if blocks.shape[1] == 1 else blocks.repeat_interleave(block_columns, dim=1)[:, :columns]


def scale_values(stored: Tensor) -> Tensor:
    """The scales in float32. A byte is an exponent of 2."""
    if stored.dtype in EXPONENTS:
        return (stored.view(torch.uint8).float() - EXPONENT_BIAS).exp2()
    return stored.float()


def plain_numbers(codes: Tensor) -> Tensor:
    """Numbers that are stored as they are, as float8 or int8."""
    return codes.float()


def fp4_numbers(codes: Tensor) -> Tensor:
    """Numbers of 4 bits (E2M1), two in a byte, the first in the lower half: (N, bytes) -> (N, 2 bytes)."""
    values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])  # (16,)
    codes = codes.view(torch.uint8)
    return values[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).int()]


def packed_integers(bits: int, *, is_signed: bool) -> Unpacking:
    """A function that unpacks integers of `bits` bits from words of 32 bits, from the lowest bits on. `is_signed`:
    half of their range is subtracted."""
    offset = 2 ** (bits - 1) if is_signed else 0

    def numbers(words: Tensor) -> Tensor:
        places = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[..., None] >> places) & (2**bits - 1)).flatten(1).float() - offset

    return numbers


def awq_integers(words: Tensor) -> Tensor:
    """Unsigned integers of 4 bits in AWQ's order: (N, words) -> (N, 8 words)."""
    places = 4 * torch.tensor(AWQ_ORDER, dtype=torch.int32)
    return ((words[..., None] >> places) & 15).flatten(1).float()
