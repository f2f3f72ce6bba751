"""Memory that a kernel takes where torch's dispatch does not see it: inside one operation, or kept for the next.

Comes in: an operation with its inputs and output.  Goes out: bytes; the compiled kernel.  Next: tracker.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
PRODUCTS = {aten._int_mm.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
# What oneDNN keeps of a product in bfloat16 or int8 for each new shape: two copies of its description (64 brgemm
# descriptors each), and small objects together. As malloc was asked for it, on a CPU with AVX-512.
COMPILED_BLOCKS = (258_376, 258_376, 40_000)


def workspace_bytes(func: Any, args: Any) -> int:
    """Bytes beyond inputs and output: only of what is as large as a batch of activations; the rest is 0.

    logsumexp makes exp(x - max(x)), of x's size.    Source: ATen/native/ReduceOps.cpp, logsumexp_out_impl.
    """
    if func is torch.ops.aten.logsumexp.default:
        return int(args[0].numel()) * int(args[0].element_size())
    return 0


def compiled_kernel(func: Any, args: Any) -> object | None:
    """What tells the kernel apart that oneDNN compiles and keeps for this operation on a CPU; None: it compiles none.

    float32 products are MKL's, which keeps nothing.
    """
    if func not in PRODUCTS:
        return None
    inputs = [leaf for leaf in args if isinstance(leaf, Tensor)]
    if inputs[0].dtype not in (torch.bfloat16, torch.int8):
        return None
    return (func, *((tuple(tensor.shape), tensor.stride()) for tensor in inputs))
