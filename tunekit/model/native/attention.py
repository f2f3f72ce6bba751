"""Causal attention inside documents, with the compiled kernels of kernels.c. attention/cpu_kernel.py has the formulas.

Products, softmax and sums are in float32, as in cpu_kernel.py. The logarithm of each query's sum of exponentials is
saved, (H, T) float32, so that the backward pass recomputes P without searching for the largest score again.

Milliseconds of this kernel, of cpu_kernel.py and of torch's sdpa, in bfloat16, forward and backward, measured on one
busy core with AVX-512, with 9 query heads and 3 key heads of width 64: 14, 31 and 66 (8 documents of 62 to 237 tokens);
15, 27 and 25 (512 tokens); 59, 96 and 65 (1,024 tokens); 172, 283 and 161 (2,048 tokens).
"""

import ctypes
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from tunekit.errors import ResourceError
from tunekit.model.attention.cpu_kernel import Lengths, attend_causally
from tunekit.model.autograd import Context
from tunekit.model.native.library import load_kernels

WIDTH_MULTIPLE = 32  # of a head
Lengthwise = tuple[tuple[Lengths, Lengths], float]  # lengths of documents and of their keys, and the scale


class _Document(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("start", "length", "first", "keys")]


class _View(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("head", ctypes.c_long), ("token", ctypes.c_long)]


class _Attention(ctypes.Structure):
    """`attention` in kernels.c."""

    _fields_ = [
        ("documents", ctypes.POINTER(_Document)),
        *((name, ctypes.c_long) for name in ("count", "heads", "groups", "width", "tokens")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
        *((name, _View) for name in ("q", "k", "v", "output", "gradient", "of_q", "of_k", "of_v")),
        ("logarithms", ctypes.c_void_p),
    ]


def attend_natively(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float, key_lengths: Lengths | None = None
) -> Tensor:
    """Compute `attend_causally` with the compiled kernel, or with torch's operations if the kernel does not support the
    tensors."""
    tensors, width = (query, key, value), query.shape[-1]
    fits = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.shape[-1] == width for t in tensors)
    if not fits or width % WIDTH_MULTIPLE:
        return attend_causally(query, key, value, lengths, scale, key_lengths)
    both = lengths, key_lengths or lengths
    return _NativeAttention.apply(*map(_dense_rows, tensors), both, scale)  # type: ignore[no-untyped-call]


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[Lengthwise],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[Lengths, Lengths],
        scale: float,
    ) -> Tensor:
        heads, tokens, width = query.shape
        output = query.new_empty(tokens, heads, width)  # (T, H, D)
        logarithms = query.new_empty(heads, tokens, dtype=torch.float32)  # (H, T)
        _run("attention_forward", (query, key, value, output.transpose(0, 1)), logarithms, lengths, scale)
        ctx.save_for_backward(query, key, value, output, logarithms)
        ctx.extra = lengths, scale
        return output

    @staticmethod
    def backward(ctx: Context[Lengthwise], *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logarithms = ctx.saved_tensors
        above = _dense_rows(gradients[0])
        inputs = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        views = (query, key, value, output.transpose(0, 1), above.transpose(0, 1), *inputs)
        _run("attention_backward", views, logarithms, *ctx.extra)
        return *inputs, None, None


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension (the width of a head) is contiguous, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _run(
    kernel: str, tensors: tuple[Tensor, ...], logarithms: Tensor, lengths: tuple[Lengths, Lengths], scale: float
) -> None:
    """Call a kernel. `tensors`: the tensors in the order of the kernel's arguments, with heads as the first dimension.

    Raises: ResourceError if there is no memory.
    """
    query, key = tensors[:2]
    documents, views = _documents(*lengths), [_View(t.data_ptr(), t.stride(0), t.stride(1)) for t in tensors]
    views += [_View()] * (8 - len(views))
    sizes = len(documents), query.shape[0], key.shape[0], query.shape[2], query.shape[1]
    call = _Attention(documents, *sizes, scale, torch.get_num_threads(), *views, logarithms.data_ptr())
    if load_kernels()[kernel](ctypes.byref(call)):
        raise ResourceError(
            "there is not enough memory for the attention scores of a document",
            "use shorter rows, or stop other programs",
        )


@lru_cache(maxsize=64)
def _documents(lengths: Lengths, key_lengths: Lengths) -> ctypes.Array[_Document]:
    starts = accumulate(lengths, initial=0), accumulate(key_lengths, initial=0)
    parts = zip(starts[0], lengths, starts[1], key_lengths, strict=False)
    return (_Document * len(lengths))(*(_Document(*part) for part in parts))
