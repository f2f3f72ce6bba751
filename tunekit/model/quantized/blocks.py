"""Unpacks matrices from the blocks of a GGUF file. Each row of a matrix is a sequence of blocks of 32 or 256 numbers.

transformers can unpack most types of blocks. This module adds Q5_0 and Q5_1, which llama.cpp uses for short rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tunekit.model.quantized.four_bit import CHUNK_ELEMENTS

BLOCK = 32  # numbers of a block of q5_0 and q5_1


def block_size(kind: str) -> tuple[int, int] | None:
    """The number of elements in a block of a type such as "q4_k", and the number of bytes. None if this type cannot be
    unpacked."""
    from transformers.integrations.gguf.dequant import GGML_BLOCK

    sizes = {"q5_0": (BLOCK, 22), "q5_1": (BLOCK, 24)}
    return sizes.get(kind) or GGML_BLOCK.get(_type_number(kind))


def row_bytes(kind: str, columns: int) -> int:
    """The number of bytes of a row with this many columns, in blocks of type `kind`, which must be a supported type."""
    size = block_size(kind)
    assert size is not None
    return columns // size[0] * size[1]


def unpack(packed: Tensor, shape: tuple[int, int], kind: str, dtype: torch.dtype) -> Tensor:
    """Unpack a matrix to its dense form (O, I). It is computed in float32 and rounded once to `dtype`. On the meta
    device, the result is a meta tensor.

    Shapes: packed (O, bytes of a row) uint8.
    """
    dense = torch.empty(shape, dtype=dtype, device=packed.device)  # (O, I)
    if packed.is_meta:
        return dense
    rows = max(1, CHUNK_ELEMENTS // shape[1])
    for first in range(0, shape[0], rows):
        part = slice(first, first + rows)
        dense[part] = _values(packed[part], kind).view(-1, shape[1])
    return dense


def _values(packed: Tensor, kind: str) -> Tensor:
    """Unpack complete rows to a flat float32 tensor."""
    if kind in ("q5_0", "q5_1"):
        return _five_bits(packed.reshape(-1, row_bytes(kind, BLOCK)), offset=kind == "q5_1")
    from transformers.integrations.gguf.dequant import dequantize

    unpacked: Callable[..., Tensor] = dequantize
    return unpacked(packed.reshape(-1), _type_number(kind), torch.float32)


def _five_bits(blocks: Tensor, offset: bool) -> Tensor:
    """Unpack blocks of 5-bit numbers q (0 to 31): (blocks, bytes) -> (blocks, 32). The values are d q + m, or d (q -
    16) if the blocks have no offset m.

    A block contains d, then m if it has an offset, then the fifth bit of every number, then the four lower bits of
    every number. Byte i has the lower bits of the numbers i and i + 16. Source: ggml-quants.c, dequantize_row_q5_0 and
    dequantize_row_q5_1.
    """
    scales = blocks[:, : 4 if offset else 2].contiguous().view(torch.float16).float()  # (blocks, 1 or 2)
    bits, low = blocks[:, -20:-16], blocks[:, -16:]
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    high = (bits[:, :, None] >> places & 1).flatten(1)  # (blocks, 32)
    values = torch.cat([low & 15, low >> 4], dim=1) | high << 4  # (blocks, 32)
    return scales[:, :1] * values + scales[:, 1:] if offset else scales[:, :1] * (values.float() - 16.0)


def _type_number(kind: str) -> int:
    """The number by which ggml identifies a type of blocks; -1 for an unknown type."""
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType.__members__.get(kind.upper(), -1))
