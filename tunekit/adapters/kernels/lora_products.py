"""The autograd functions of joined_lora.py: several adapted products of one input, and a gated MLP.

The inputs are base layers with scalings, x (..., I), and factors A (R, I) and B (O, R) in float32. Each output is
(..., O). With y = W x + s B A x and g = dL/dy: dx = g W + s (g B) A, dB = s g^T (x A^T), dA = s (g B)^T x.
With dropout p, each layer has a separate mask m: m x replaces x as A's input, and s / (1 - p) replaces s. Masks are
saved with one byte per element, because drawing them again is slow on a CPU.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tunekit.adapters.base import Casts, LayerAdapter
from tunekit.model.autograd import Context
from tunekit.model.quantized.weights import exact_product, product_matrix
from tunekit.recipe.bases.low_rank import LowRankSettings


@dataclass(frozen=True, eq=False)
class DropMasks:
    """Dropout masks of the layers' inputs: one bool mask (N, I) for each layer. Without dropout, `masks` is empty."""

    masks: tuple[Tensor, ...] = ()
    scale: float = 1.0  # 1 / (1 - p)


def draw_masks(x: Tensor, dropout: float, count: int) -> DropMasks:
    """`count` dropout masks for x (..., I), drawn one after the other, as torch's dropout draws them."""
    if not dropout:
        return DropMasks()
    flat = x.reshape(-1, x.shape[-1])  # (N, I)
    if flat.device.type in ("cuda", "xpu"):
        return DropMasks(tuple(torch.native_dropout(flat, dropout, True)[1] for _ in range(count)), 1 / (1 - dropout))
    empty = (torch.empty_like(flat, dtype=torch.bool) for _ in range(count))
    return DropMasks(tuple(mask.bernoulli_(1 - dropout) for mask in empty), 1 / (1 - dropout))


class Products:
    """W_p x + s_p B_p A_p x for each layer p of a group. `factors`: A_1, B_1, A_2, B_2, ..."""

    def __init__(self, layers: Sequence[LayerAdapter[LowRankSettings]], casts: Casts) -> None:
        self.bases, self.scalings = [layer.base_layer for layer in layers], [layer.scaling for layer in layers]
        ends = accumulate((len(layer.A) for layer in layers), initial=0)
        # the columns of each layer's rank in the joined product
        self.columns = [slice(start, end) for start, end in pairwise(ends)]
        self.casts = casts

    def _joined_a(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The factors A of all layers, stacked to one matrix (sum of R, I)."""
        if len(self.bases) == 1:
            return self._cast(factors[0], (id(self), "a"), dtype)
        return self.casts.get((id(self), "a", dtype), lambda: torch.cat([a.detach() for a in factors[::2]]).to(dtype))

    def _cast(self, factor: Tensor, key: tuple[Hashable, ...], dtype: torch.dtype) -> Tensor:
        factor = factor.detach()
        return factor if factor.dtype == dtype else self.casts.get((*key, dtype), lambda: factor.to(dtype))

    def _b(self, index: int, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return self._cast(factors[2 * index + 1], (id(self), index), dtype)

    def forward(self, x: Tensor, factors: Sequence[Tensor], masks: DropMasks) -> list[Tensor]:
        """The output of each layer. Shapes: x (..., I) -> (..., O)."""
        outputs = []
        for index, (base, low) in enumerate(zip(self.bases, self._lows(x, factors, masks), strict=True)):
            bias: Tensor | None = getattr(base, "bias", None)
            y = exact_product(base, x, None if bias is None else bias.to(x.dtype))
            b = self._b(index, factors, x.dtype)
            y.view(-1, y.shape[-1]).addmm_(low, b.t(), alpha=self.scalings[index] * masks.scale)
            outputs.append(y)
        return outputs

    def _lows(self, x: Tensor, factors: Sequence[Tensor], masks: DropMasks) -> list[Tensor]:
        """A x of each layer, (N, R). Without masks, one product computes them for all layers."""
        flat, a = x.reshape(-1, x.shape[-1]), self._joined_a(factors, x.dtype)  # (N, I), (sum of R, I)
        if masks.masks:
            return [
                torch.where(mask, flat, 0) @ a[rows].t() for mask, rows in zip(masks.masks, self.columns, strict=True)
            ]
        low = flat @ a.t()  # (N, sum of R)
        return [low[:, columns] for columns in self.columns]

    def backward(
        self, x: Tensor, factors: Sequence[Tensor], gradients: Sequence[Tensor | None], wants_x: bool, masks: DropMasks
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx (..., I), or None if not wanted, and the factors' gradients in float32. An output gradient of None means
        zero."""
        if masks.masks:
            return self._masked_backward(x, factors, gradients, wants_x, masks)
        flat, a = x.reshape(-1, x.shape[-1]), self._joined_a(factors, x.dtype)
        low = flat @ a.t()  # (N, sum of R)
        through = torch.zeros_like(low)  # (N, sum of R): s g B
        of_x: Tensor | None = None  # (N, I), summed in place
        of_factors = [torch.zeros_like(factor) for factor in factors]
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            g, ranks = gradient.reshape(-1, gradient.shape[-1]), self.columns[index]  # (N, O)
            through[:, ranks] = (g @ self._b(index, factors, x.dtype)).mul_(self.scalings[index])
            of_factors[2 * index + 1].copy_((g.t() @ low[:, ranks]).mul_(self.scalings[index]))
            if wants_x:
                w = product_matrix(self.bases[index], x.dtype)  # (O, I)
                of_x = g @ w if of_x is None else of_x.addmm_(g, w)
                del w
        of_a = through.t() @ flat  # (sum of R, I)
        for index, ranks in enumerate(self.columns):
            of_factors[2 * index].copy_(of_a[ranks])
        return None if of_x is None else of_x.addmm_(through, a).view(x.shape), of_factors

    def _masked_backward(
        self, x: Tensor, factors: Sequence[Tensor], gradients: Sequence[Tensor | None], wants_x: bool, masks: DropMasks
    ) -> tuple[Tensor | None, list[Tensor]]:
        """`backward` for layers with masks."""
        flat, a = x.reshape(-1, x.shape[-1]), self._joined_a(factors, x.dtype)
        of_x = torch.zeros_like(flat) if wants_x else None  # (N, I)
        of_factors = [torch.zeros_like(factor) for factor in factors]
        for index, (gradient, mask) in enumerate(zip(gradients, masks.masks, strict=True)):
            if gradient is None:
                continue
            layer_a, scaling = a[self.columns[index]], self.scalings[index] * masks.scale
            g, dropped = gradient.reshape(-1, gradient.shape[-1]), torch.where(mask, flat, 0)  # (N, O), (N, I)
            through = (g @ self._b(index, factors, x.dtype)).mul_(scaling)  # (N, R)
            of_factors[2 * index].copy_(through.t() @ dropped)
            of_factors[2 * index + 1].copy_((g.t() @ (dropped @ layer_a.t())).mul_(scaling))
            del dropped
            if of_x is not None:
                of_x.add_(torch.where(mask, through @ layer_a, 0)).addmm_(g, product_matrix(self.bases[index], x.dtype))
        return None if of_x is None else of_x.view(x.shape), of_factors


def _no_view(output: Tensor) -> Tensor:
    """The output as a tensor that is not a view.

    A linear layer with a bias returns a view. torch does not allow in-place changes of a view that an autograd function
    returns, but DeBERTa makes such changes.
    """
    return torch.ops.aten._unsafe_view(output, output.shape)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[tuple[Products, float]], group: Products, dropout: float, x: Tensor, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        masks = draw_masks(x, dropout, len(group.bases))
        ctx.extra = group, masks.scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *factors, *masks.masks)
        return tuple(map(_no_view, group.forward(x, factors, masks)))

    @staticmethod
    def backward(ctx: Context[tuple[Products, float]], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (group, scale), (x, *others) = ctx.extra, ctx.saved_tensors
        count = 2 * len(group.bases)
        masks = DropMasks(tuple(others[count:]), scale)
        of_x, of_factors = group.backward(x, others[:count], gradients, ctx.needs_input_grad[2], masks)
        return None, None, of_x, *of_factors


def products(group: Products, x: Tensor, factors: Sequence[Tensor], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """The output of each layer of the group."""
    return _Products.apply(group, dropout, x, *factors)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class Gated:
    """y = down(act(gate(x)) * up(x)); `inner` computes the outputs of the layers gate and up."""

    inner: Products
    activation: Callable[[Tensor], Tensor]
    down: Products

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up; shapes (..., H)."""
        active = self.activation(gate)
        return active * up if active is gate else active.mul_(up)  # a linear activation returns gate itself

    def backward(
        self, gate: Tensor, up: Tensor, through_down: Callable[[Tensor], tuple[Tensor, list[Tensor]]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of `gate`, of `up`, and of the factors of `down`. `through_down`: computes from h = act(gate) * up
        the gradient of h and the gradients of these factors."""
        with torch.enable_grad():
            source = gate.detach().requires_grad_()
            activated = self.activation(source)
        active = activated.detach()  # (..., H)
        of_hidden, of_down = through_down(active * up)
        of_up = of_hidden * active
        (of_gate,) = torch.autograd.grad(activated, source, of_hidden.mul_(up))
        return of_gate, of_up, of_down


class _Gated(torch.autograd.Function):
    """The gated MLP. It saves x and the outputs of `gate` and `up`; the activation and its product with `up` are
    recomputed."""

    @staticmethod
    def forward(ctx: Context[tuple[Gated, float]], gated: Gated, dropout: float, x: Tensor, *factors: Tensor) -> Tensor:
        inner = draw_masks(x, dropout, 2)
        gate, up = gated.inner.forward(x, factors[:4], inner)
        hidden = gated.hidden(gate, up)  # (..., H)
        down = draw_masks(hidden, dropout, 1)
        ctx.extra = gated, inner.scale
        ctx.save_for_backward(x, gate, up, *factors, *inner.masks, *down.masks)
        return _no_view(gated.down.forward(hidden, factors[4:], down)[0])

    @staticmethod
    def backward(ctx: Context[tuple[Gated, float]], *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gated, scale), (x, gate, up, *others) = ctx.extra, ctx.saved_tensors
        factors, masks = others[:6], (others[6:8], others[8:])
        inner, down = (DropMasks(tuple(side), scale) for side in masks)

        def through_down(hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
            of_hidden, of_factors = gated.down.backward(hidden, factors[4:], gradients, True, down)
            assert of_hidden is not None
            return of_hidden, of_factors

        of_gate, of_up, of_down = gated.backward(gate, up, through_down)
        of_x, of_inner = gated.inner.backward(x, factors[:4], (of_gate, of_up), ctx.needs_input_grad[2], inner)
        return None, None, of_x, *of_inner, *of_down


def gated_product(gated: Gated, x: Tensor, factors: Sequence[Tensor], dropout: float = 0.0) -> Tensor:
    """The MLP's output. `factors`: A and B of the layers gate, up and down, in this order."""
    return _Gated.apply(gated, dropout, x, *factors)  # type: ignore[no-untyped-call]
