"""Kernels that only an accelerator has, from torch's own operators, with the checks that the real ones make."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

KEYS = 128  # of a block; over more of them the real kernel adds up the gradient of the queries in no fixed order
NOISE = torch.Generator()  # seeded by nobody

if TYPE_CHECKING:
    from tests.devices.simulated import Double


def register_plain_attention(kind: str) -> None:
    """Of XPU and MPS: what torch falls back to, since here there is none of the kernels among which it chooses."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False,
        **named: Any,
    ) -> Tensor:  # fmt: skip
        output: Tensor = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, **named)[0]
        return output

    global LIBRARY
    LIBRARY = torch.library.Library("aten", "IMPL")
    for key in (kind.upper(), f"Autograd{kind.upper()}"):
        LIBRARY.impl("scaled_dot_product_attention", attend, key)
    LIBRARY.impl("_fused_sdp_choice", lambda *tensors, **named: torch.nn.attention.SDPBackend.MATH.value, kind.upper())


def register(double: Double) -> None:
    """Flash attention over documents of varying lengths, forward and backward."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, keys: Tensor, max_q: int, max_k: int, *rest: Any,
        scale: Any = None, **named: Any,
    ) -> Any:  # fmt: skip
        _check(double, q, k, v, starts, keys)
        empty, sees = torch.empty(0, device=q.device), _Sees.of(*rest, **named)
        with double.unwatched(), torch.no_grad():
            documents = _documents(starts, keys, q, k, v)
            _check_longest(documents, max_q, max_k)
            out = torch.cat([_attention(*part, scale, sees)[0] for part in documents])
        seeds = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return out.to(q.dtype), torch.zeros(q.shape[1], q.shape[0], device=q.device), seeds, empty, empty

    def backward(
        gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, starts: Tensor, keys: Tensor,
        max_q: int, max_k: int, *rest: Any, scale: Any = None, **named: Any,
    ) -> Any:  # fmt: skip
        _check(double, q, k, v, starts, keys)
        with double.unwatched(), torch.no_grad():
            documents = _documents(starts, keys, q, k, v, gradient)
            _check_longest(documents, max_q, max_k)
            found = [_gradients(*part, scale, _Sees.of(*rest, **named)) for part in documents]
            of_q, *others = (torch.cat(each) for each in zip(*found, strict=True))
            of_k, of_v = (each.unflatten(1, (k.shape[1], -1)).sum(2) for each in others)
            longest = max(len(part[1]) for part in documents)
            if longest > KEYS and not torch.are_deterministic_algorithms_enabled():
                of_q = of_q * (1 + 1e-6 * torch.randn(of_q.shape, generator=NOISE).to(of_q.device))
        return of_q.to(q.dtype), of_k.to(q.dtype), of_v.to(q.dtype)

    global LIBRARY
    LIBRARY = torch.library.Library("aten", "IMPL")
    LIBRARY.impl("_flash_attention_forward", forward, "CUDA")
    LIBRARY.impl("_flash_attention_backward", backward, "CUDA")
    LIBRARY.impl("_conv_depthwise2d", partial(_convolution, double), "CUDA")
    LIBRARY.impl("convolution_backward", partial(_convolution_backward, double), "CUDA")


def _convolution(double: Double, x: Tensor, weight: Tensor, kernel: Any, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Each channel by itself, for which the CPU has no operator of this name."""
    with double.unwatched():
        on_host = [None if each is None else each.cpu() for each in (x, weight, bias)]
        return torch.conv2d(*on_host, *geometry, groups=x.shape[1]).to(x.device)  # type: ignore[arg-type]


def _convolution_backward(double: Double, gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    """Of any convolution: torch's own asks a GPU for the kernel of channels by themselves."""
    with double.unwatched():
        found = torch.ops.aten.convolution_backward(*(each.cpu() for each in (gradient, x, weight)), *rest)
    return tuple(None if each is None else each.to(x.device) for each in found)


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SCALES, BYTES = (torch.float32,), (torch.uint8,)
# What bitsandbytes' CUDA kernels take by raw pointer, and so do not check: tensors of one device without gaps, in these
# dtypes. Source: bitsandbytes/backends/cuda/ops.py.
RAW: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "dequantize_4bit": {"A": BYTES, "absmax": SCALES},
    "dequantize_blockwise": {"A": BYTES, "absmax": SCALES, "code": SCALES},
    "gemm_4bit": {
        "A": FLOATS,
        "B": BYTES,
        "absmax": SCALES,
        "bias": FLOATS,
        "absmax_8bit": BYTES,
        "absmax_code": SCALES,
        "absmax_offset": SCALES,
    },
    "int8_linear_matmul": {"A": (torch.int8,), "B": (torch.int8,)},
    "int8_mm_dequant": {"A": (torch.int32,), "row_stats": SCALES, "col_stats": SCALES},
    "int8_vectorwise_quant": {"A": (torch.float16,)},
    "optimizer_update_32bit": {"g": FLOATS, "p": FLOATS, "state1": SCALES, "state2": SCALES},
    "optimizer_update_8bit_blockwise": {
        "g": FLOATS,
        "p": FLOATS,
        "state1": BYTES,
        "state2": BYTES,
        **dict.fromkeys(("qmap1", "qmap2", "absmax1", "absmax2"), SCALES),
    },
}
CALLED: Counter[str] = Counter()  # bitsandbytes' kernels that were used


def check_raw(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raises: RuntimeError for a tensor that the real kernel would read wrongly, or not at all."""
    operation = getattr(torch.ops.bitsandbytes, name).default
    values = dict(zip((argument.name for argument in operation._schema.arguments), given, strict=False)) | named
    tensors = {key: values[key] for key in RAW[name] if isinstance(values.get(key), Tensor)}
    place = next(iter(tensors.values())).device
    for key, tensor in tensors.items():
        there = tensor.device == place or getattr(tensor, "is_paged", False)
        if not there or not tensor.is_contiguous() or tensor.dtype not in RAW[name][key]:
            found = f"{tensor.dtype} on {tensor.device}{'' if tensor.is_contiguous() else ' with gaps'}"
            raise RuntimeError(f"bitsandbytes::{name} reads {key} by a raw pointer, and it is {found}")
    same = [tensors[key].dtype for key in ("g", "p") if key in tensors]
    if len(set(same)) > 1 or ("bias" in tensors and tensors["bias"].dtype != tensors["A"].dtype):
        raise RuntimeError(f"bitsandbytes::{name} got tensors of several dtypes for one")
    CALLED[name] += 1


def register_products(plain: dict[str, Any], kind: str) -> None:
    """bitsandbytes' kernels by what it has for any device (`plain`, by name), with checks that the real ones lack."""
    global_library = torch.library.Library("bitsandbytes", "IMPL")
    for name in (name for name in RAW if not name.startswith("optimizer")):

        def checked(*given: Any, name: str = name, **named: Any) -> Any:
            check_raw(name, given, named)
            return plain[name](*given, **named)

        global_library.impl(name, checked, kind.upper())
    OPTIMIZERS.append(global_library)


def register_optimizers(double: Double, library: Any, kind: str) -> None:
    """bitsandbytes' updates by what it has for a CPU, and memory of the host that a device's kernels reach by pages."""
    from bitsandbytes.backends.cpu import ops

    def reaching(name: str, update: Any) -> Any:
        def updated(*given: Any) -> None:
            check_raw(name, given, {})
            with double.unwatched(), torch.no_grad():
                there = [each.to(kind) if isinstance(each, Tensor) and each.is_cpu else each for each in given]
                update(*there)
                for own, moved in zip(given, there, strict=True):
                    if own is not moved:
                        own.copy_(moved)

        return updated

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        found: Any = torch.empty(shape, dtype=dtype)
        found.is_paged, found.page_deviceid = True, device.index
        return found

    functional, global_library = library.functional, torch.library.Library("bitsandbytes", "IMPL")
    functional.get_paged, functional.prefetch_tensor = get_paged, lambda tensor, to_cpu=False: None
    functional.fill = lambda tensor, value, device=None, prefetch=True: tensor.fill_(value)
    for name in ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"):
        global_library.impl(name, reaching(name, getattr(ops, f"_{name}_cpu")), kind.upper())
    OPTIMIZERS.append(global_library)


OPTIMIZERS: list[torch.library.Library] = []  # they hold as long as they are here


def _check(double: Double, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, keys: Tensor) -> None:
    if double.properties.major < 8:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimensions that are multiples of 8, at most 256")
    assert starts.dtype == keys.dtype == torch.int32
    assert all(tensor.is_cuda and tensor.stride(-1) == 1 for tensor in (q, k, v, starts, keys))


def _check_longest(documents: list[list[Tensor]], max_q: int, max_k: int) -> None:
    """The real kernel computes nothing beyond these."""
    assert max(len(part[0]) for part in documents) <= max_q
    assert max(len(part[1]) for part in documents) <= max_k


def _documents(starts: Tensor, keys: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> list[list[Tensor]]:
    """Each document's part of every tensor, (t, heads, d) float32, of keys and values (s, heads, d), which are repeated
    for each head."""
    times = q.shape[1] // k.shape[1]
    of_keys = [each.repeat_interleave(times, 1).float() for each in (k, v)]
    cut = (
        [[each[start:end] for each in tensors] for start, end in pairwise(bounds.tolist())]
        for bounds, tensors in ((starts, [q.float(), *(each.float() for each in more)]), (keys, of_keys))
    )
    return [[first, *seen, *others] for (first, *others), seen in zip(*cut, strict=True)]


class _Sees(NamedTuple):
    """How many keys before its own place a query sees, and how many after it; -1: all."""

    before: int
    after: int

    @classmethod
    def of(
        cls, dropout: float, causal: bool, *rest: Any, window_size_left: int | None = None,
        window_size_right: int | None = None, **named: Any,
    ) -> _Sees:  # fmt: skip
        assert not dropout
        before, after = (-1 if size is None else size for size in (window_size_left, window_size_right))
        return cls(before, 0 if causal else after)

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(t, s) bool; the last query's place is that of the last key."""
        places = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
        seen = torch.ones_like(places, dtype=torch.bool)
        seen &= places >= -self.before if self.before >= 0 else True
        seen &= places <= self.after if self.after >= 0 else True
        return seen


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, sees: _Sees) -> tuple[Tensor, Tensor, float]:
    """What the heads give (t, heads, d), their weights (heads, t, s), and the scale."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    hidden = ~sees.mask(len(q), len(k), q.device)
    weights = (torch.einsum("thd,shd->hts", q, k) * scale).masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v), weights, scale


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float | None, sees: _Sees
) -> tuple[Tensor, ...]:
    """Of q, (t, heads, d), and of k and v, (s, heads, d) each."""
    _, weights, scale = _attention(q, k, v, scale, sees)
    of_weights = torch.einsum("thd,shd->hts", gradient, v)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    of_keys, of_values = torch.einsum("hts,thd->shd", of_scores, q), torch.einsum("hts,thd->shd", weights, gradient)
    return torch.einsum("hts,shd->thd", of_scores, k), of_keys, of_values
