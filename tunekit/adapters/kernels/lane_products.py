"""Computes a module for the rows of several training runs in one forward. One product with the base's matrix serves all
rows; grouped products compute the low-rank updates of all runs.

For run k with rows x_k: y_k = W x_k + B_k A_k x_k, with the run's scaling in B_k. With g_k = dL/dy_k:
dx_k = g_k W + (g_k B_k) A_k, dB_k = g_k^T (x_k A_k^T), dA_k = (g_k B_k)^T x_k.
Ranks are padded with zeros, which changes no number. If all runs have the same number of rows, batched products are
used.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.adapters.base import Casts, LayerAdapter, Wrapper
from tunekit.model.autograd import Context
from tunekit.model.call import current_call
from tunekit.model.quantized.weights import exact_product, multiplies_exactly, product_matrix

RANK_MULTIPLE = 8  # a row of a factor in 16 bits then has a multiple of 16 bytes, as grouped products need
Extra = tuple["LaneProducts", tuple[int, ...]]


def grouped(x: Tensor, matrices: Tensor, lengths: Sequence[int]) -> Tensor:
    """The product of each group of rows with its matrix: x (N, I), matrices (K, I, O) -> (N, O)."""
    if len(set(lengths)) == 1:
        return torch.bmm(x.view(len(lengths), -1, x.shape[-1]), matrices).flatten(0, 1)
    return F.grouped_mm(x, matrices, offs=_ends(lengths, x.device))


def grouped_outer(x: Tensor, y: Tensor, lengths: Sequence[int]) -> Tensor:
    """x_k^T y_k for each group of rows: x (N, P), y (N, Q) -> (K, P, Q)."""
    if len(set(lengths)) == 1:
        count = len(lengths)
        return torch.bmm(x.view(count, -1, x.shape[-1]).transpose(1, 2), y.view(count, -1, y.shape[-1]))
    return F.grouped_mm(x.t(), y, offs=_ends(lengths, x.device))


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(lengths)), dtype=torch.int32, device=device)


class LaneProducts(Wrapper):
    """Replaces a module in the network that several runs share. `layers`: the adapted layer of each run, or None for a
    run that does not adapt the module."""

    def __init__(self, base: nn.Module, layers: Sequence[LayerAdapter[Any] | None], casts: Casts) -> None:
        super().__init__(base)
        self.__dict__["layers"] = list(layers)  # not submodules: they belong to the networks of their runs
        self.casts = casts

    def forward(self, x: Tensor) -> Tensor:
        """The module's output. Shapes: x (1, N, I), the rows of all runs one after the other -> (1, N, O)."""
        lengths = current_call().lanes
        if x.shape[:-1] != (1, sum(lengths)):
            raise ValueError(f"a layer's input has the shape {tuple(x.shape)} instead of {sum(lengths)} rows")
        pairs = [factor for layer in self.layers if layer is not None for factor in layer.thin_factors()]
        return _LaneProducts.apply(self, lengths, x, *pairs)  # type: ignore[no-untyped-call]

    def stacked(self, factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (K, R, I) and the transposed B (K, R, O) of all runs in this dtype; zeros for runs without a layer."""
        a = self.casts.get((id(self), "a", dtype), lambda: self._stack(factors[::2], dtype))
        return a, self.casts.get((id(self), "b", dtype), lambda: self._stack([b.t() for b in factors[1::2]], dtype))

    def _stack(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Stacks the factors (R_k, ...) of all runs to (K, R, ...). Runs that do not adapt the module get zeros."""
        rank = -(-max(map(len, factors)) // RANK_MULTIPLE) * RANK_MULTIPLE
        stack, left = factors[0].new_zeros(len(self.layers), rank, factors[0].shape[1], dtype=dtype), iter(factors)
        for lane, layer in enumerate(self.layers):
            if layer is not None:
                factor = next(left)
                stack[lane, : len(factor)] = factor
        return stack


class _LaneProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[Extra], module: LaneProducts, lengths: tuple[int, ...], x: Tensor, *factors: Tensor
    ) -> Tensor:
        flat, (a, b) = x.reshape(-1, x.shape[-1]), module.stacked(factors, x.dtype)
        bias: Tensor | None = getattr(module.base_layer, "bias", None)
        y = exact_product(module.base_layer, x, None if bias is None else bias.to(x.dtype))
        low = grouped(flat, a.transpose(1, 2), lengths)  # (N, R)
        ctx.extra = module, lengths
        ctx.save_for_backward(x, low, *factors)
        return y + grouped(low, b, lengths).view(y.shape)

    @staticmethod
    def backward(ctx: Context[Extra], *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (module, lengths), (x, low, *factors) = ctx.extra, ctx.saved_tensors
        a, b = module.stacked(factors, x.dtype)
        g, flat = gradients[0].reshape(-1, gradients[0].shape[-1]), x.reshape(-1, x.shape[-1])
        through = grouped(g, b.transpose(1, 2), lengths)  # (N, R): g_k B_k
        of_a, of_b = grouped_outer(through, flat, lengths), grouped_outer(g, low, lengths)  # (K, R, I), (K, O, R)
        of_factors: list[Tensor] = []
        for lane, layer in enumerate(module.layers):
            if layer is not None:
                rank = len(factors[len(of_factors)])
                of_factors += [of_a[lane, :rank].float(), of_b[lane, :, :rank].float()]
        of_x = None
        if ctx.needs_input_grad[2]:
            of_x = grouped(through, a, lengths).addmm_(g, product_matrix(module.base_layer, x.dtype)).view(x.shape)
        return None, None, of_x, *of_factors


def obstacle_to_lanes(layers: Sequence[LayerAdapter[Any]]) -> str | None:
    """The reason why a run with these layers cannot share forwards with other runs, or None."""
    for layer in layers:
        plain = layer.target.kind == "linear" and multiplies_exactly(layer.base_layer)
        if not (layer.is_additive and layer.is_thin and plain):
            return f"the method {layer.settings.method} does not compute an update B A x of linear layers"
        if getattr(layer.settings, "dropout", 0.0):
            return "adapter.dropout is on"
    return None
