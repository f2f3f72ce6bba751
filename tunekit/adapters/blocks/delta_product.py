"""Multiplies x by a matrix that is computed from small factors at each use. Only the factors are saved for the backward
pass."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tunekit.adapters.base import LayerAdapter, Settings
from tunekit.model.autograd import Context


class DeltaLayer(LayerAdapter[Settings]):
    """y = W x + D x, with D (O, I) computed from the layer's trained tensors at each use. A subclass defines `make`."""

    make: Callable[..., Tensor]  # the trained tensors, in the order of their slots -> D (O, I)

    def factors(self) -> list[Tensor]:
        """The trained tensors."""
        return [getattr(self, name) for name, slot in self.declared.items() if slot.kind == "trained"]

    def update(self, x: Tensor) -> Tensor:
        return delta_product(x, self.make, *self.factors())

    def delta(self) -> Tensor:
        return self.make(*self.factors())


def delta_product(x: Tensor, make: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """y = x D^T with D = make(*factors), which is computed again in the backward pass.

    Shapes: x (..., I); D (O, I) -> y (..., O). D is computed in the factors' dtype, and then cast to the dtype of x.
    """
    return _DeltaProduct.apply(x, make, *factors)  # type: ignore[no-untyped-call]


class _DeltaProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[Callable[..., Tensor]], x: Tensor, make: Callable[..., Tensor], *factors: Tensor
    ) -> Tensor:
        ctx.extra = make
        ctx.save_for_backward(x, *factors)
        return F.linear(x, make(*factors).to(x.dtype))

    @staticmethod
    def backward(ctx: Context[Callable[..., Tensor]], *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # (..., O)
        x, *factors = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_(factor.is_floating_point()) for factor in factors]
            delta = ctx.extra(*leaves)  # (O, I)
        of_x = gradient @ delta.detach().to(gradient.dtype) if ctx.needs_input_grad[0] else None  # (..., I)
        flat, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])  # (N, O), (N, I)
        of_delta = (flat.t() @ inputs).to(delta.dtype)  # (O, I)
        return of_x, None, *torch.autograd.grad(delta, leaves, of_delta)
