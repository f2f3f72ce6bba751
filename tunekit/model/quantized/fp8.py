"""Weights in float8 (e4m3) with one scale per row. A product also rounds its input to float8, so its result is
approximate.

On a GPU of compute capability 8.9 or more (RTX 40xx, L4, H100), float8 units compute the product. Elsewhere the same
rounded numbers are multiplied in float32. A CPU therefore gives the same results as a GPU, except for the order of
sums.
"""

from functools import cache

import torch
from torch import Tensor

from tunekit.contracts import Tensors
from tunekit.machine.devices import capability

LARGEST = 448.0  # the maximum of e4m3
KIND = torch.float8_e4m3fn
MULTIPLE = 16  # the float8 units require sides that are multiples of 16
CAPABILITY = (8, 9)


def computes_fp8(device: torch.device) -> bool:
    """Whether float8 products run natively on `device`. A GPU that is not on this machine is assumed to support
    them; on one that is here, a product is tried once."""
    return capability(device) >= CAPABILITY and (not torch.cuda.is_available() or _multiplies(device))


@cache
def _multiplies(device: torch.device) -> bool:
    """Whether a product with a scale per row works. Windows has none, and some builds fail on new GPUs (pytorch
    #192707)."""
    side = torch.ones(MULTIPLE, MULTIPLE, device=device).to(KIND)
    scale = torch.ones(MULTIPLE, 1, device=device)
    try:
        result: Tensor = torch._scaled_mm(side, side.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
        return bool((result == MULTIPLE).all())
    except (RuntimeError, NotImplementedError, ValueError):
        return False


def scaled_rows(rows: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Multiply each row by largest / absmax(row): (N, I) -> (N, I) float32, absmax (N,) float32."""
    values = rows.float()
    absmax = values.abs().amax(dim=1)  # (N,)
    scale = torch.where(absmax > 0, largest / absmax, torch.zeros_like(absmax))  # (N,)
    return (values * scale[:, None]).clamp_(-largest, largest), absmax


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to e4m3 with its own scale: (N, I) -> (N, I) float8, absmax (N,) float32; row = q absmax / 448."""
    values, absmax = scaled_rows(rows, LARGEST)
    return values.to(KIND), absmax


def pack(matrix: Tensor) -> Tensors:
    """Pack a dense (O, I) matrix to bytes (O, I) and absmax (O,). The same matrix always gives the same bytes."""
    values, absmax = round_rows(matrix)
    return {"packed": values.view(torch.uint8), "absmax": absmax}


def unpack(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack to the dense (O, I) matrix in `dtype`."""
    return (packed.view(KIND).float() * (absmax / LARGEST)[:, None]).to(dtype)


def product(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    """x (N, I) times packed (O, I), both in float8 -> (N, O) in x's dtype."""
    values, of_x = round_rows(x)
    sides = (of_x / LARGEST)[:, None], (absmax / LARGEST)[None]  # (N, 1), (1, O)
    weights = packed.view(KIND).t()  # (I, O), column-major, as the units require
    if computes_fp8(x.device) and not any(side % MULTIPLE for side in packed.shape):
        scaled: Tensor = torch._scaled_mm(
            values, weights, scale_a=sides[0], scale_b=sides[1].contiguous(), out_dtype=torch.bfloat16
        )
        return scaled.to(x.dtype)
    return ((values.float() @ weights.float()) * sides[0] * sides[1]).to(x.dtype)
