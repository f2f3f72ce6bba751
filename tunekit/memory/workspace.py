"""Memory that a kernel takes and gives back inside one operation, where torch's dispatch does not see it.

Comes in: an operation with its inputs and output.  Goes out: bytes.  Next: tracker.py.
"""

from __future__ import annotations

from typing import Any

import torch


def workspace_bytes(func: Any, args: Any) -> int:
    """Bytes beyond inputs and output: only of what is as large as a batch of activations; the rest is 0.

    logsumexp makes exp(x - max(x)), of x's size.    Source: ATen/native/ReduceOps.cpp, logsumexp_out_impl.
    """
    if func is torch.ops.aten.logsumexp.default:
        return int(args[0].numel()) * int(args[0].element_size())
    return 0
