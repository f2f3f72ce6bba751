"""The autograd functions of fused.py: several adapted products of one input, and a gated MLP.

Comes in: base layers with scalings, x (..., I), factors A (R, I) and B (O, R) in float32.  Goes out: (..., O) each.
With y = W x + s B A x and g = dL/dy:  dx = g W + s (g B) A,  dB = s g^T (x A^T),  dA = s (g B)^T x.
With dropout, y = W x + s B A (m x), where each layer has a mask m of its own. The state of the generator before the
masks is kept, not the masks: they are drawn again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.model.weights import product_matrix


class Casts:
    """Factors in the compute dtype, made once for as long as no weight changes, else for every use."""

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside the block the trained weights do not change: what was cast is used again."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def get(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, or gave before under this key."""
        if self._kept is None:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


@dataclass(frozen=True, eq=False)
class Member:
    """One adapted layer of a group."""

    base: nn.Module
    scaling: float
    rank: int


class Products:
    """W_p x + s_p B_p A_p x for each layer p of a group. `factors`: A_1, B_1, A_2, B_2, ..."""

    def __init__(self, members: Sequence[Member], casts: Casts) -> None:
        self.members, self.casts = tuple(members), casts
        starts = [sum(member.rank for member in members[:index]) for index in range(len(members))]
        self.places = [slice(start, start + member.rank) for start, member in zip(starts, members, strict=True)]

    def _joined_a(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(sum of R, I): every A, one below the other."""
        if len(self.members) == 1:
            return self._cast(factors[0], (id(self), "a"), dtype)
        return self.casts.get((id(self), "a", dtype), lambda: torch.cat([a.detach() for a in factors[::2]]).to(dtype))

    def _cast(self, factor: Tensor, key: Any, dtype: torch.dtype) -> Tensor:
        factor = factor.detach()
        return factor if factor.dtype == dtype else self.casts.get((*key, dtype), lambda: factor.to(dtype))

    def _b(self, index: int, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return self._cast(factors[2 * index + 1], (id(self), index), dtype)

    def forward(self, x: Tensor, factors: Sequence[Tensor], dropout: float = 0.0) -> list[Tensor]:
        """Shapes: x (..., I) -> (..., O) of each layer. `dropout`: of what goes into the A's."""
        outputs = []
        for index, (member, low) in enumerate(zip(self.members, self._lows(x, factors, dropout), strict=True)):
            bias: Any = member.base.bias
            y = F.linear(x, product_matrix(member.base, x.dtype), None if bias is None else bias.to(x.dtype))
            b = self._b(index, factors, x.dtype)
            y.view(-1, y.shape[-1]).addmm_(low, b.t(), alpha=member.scaling)
            outputs.append(y)
        return outputs

    def _lows(self, x: Tensor, factors: Sequence[Tensor], dropout: float) -> list[Tensor]:
        """A x of each layer, (N, R); one product where no mask tells them apart."""
        flat, a = x.reshape(-1, x.shape[-1]), self._joined_a(factors, x.dtype)  # (N, I), (sum of R, I)
        if not dropout:
            low = flat @ a.t()  # (N, sum of R)
            return [low[:, place] for place in self.places]
        return [F.dropout(flat, dropout) @ a[place].t() for place in self.places]

    def backward(
        self, x: Tensor, factors: Sequence[Tensor], gradients: Sequence[Tensor | None], wants_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx (..., I), None unless wanted, and the factors' gradients in float32. A gradient of None is zero."""
        flat, a = x.reshape(-1, x.shape[-1]), self._joined_a(factors, x.dtype)
        low = flat @ a.t()  # (N, sum of R)
        through = torch.zeros_like(low)  # (N, sum of R): s g B
        of_x: Tensor | None = None  # (N, I), summed in place
        of_factors = [torch.zeros_like(factor) for factor in factors]
        for index, (member, gradient) in enumerate(zip(self.members, gradients, strict=True)):
            if gradient is None:
                continue
            g, place = gradient.reshape(-1, gradient.shape[-1]), self.places[index]  # (N, O)
            through[:, place] = (g @ self._b(index, factors, x.dtype)).mul_(member.scaling)
            of_factors[2 * index + 1].copy_((g.t() @ low[:, place]).mul_(member.scaling))
            if wants_x:
                w = product_matrix(member.base, x.dtype)  # (O, I)
                of_x = g @ w if of_x is None else of_x.addmm_(g, w)
                del w
        of_a = through.t() @ flat  # (sum of R, I)
        for index, place in enumerate(self.places):
            of_factors[2 * index].copy_(of_a[place])
        return None if of_x is None else of_x.addmm_(through, a).view(x.shape), of_factors

    def dropped_backward(
        self, x: Tensor, factors: Sequence[Tensor], gradients: Sequence[Tensor | None], wants_x: bool, dropout: float
    ) -> tuple[Tensor | None, list[Tensor]]:
        """As `backward`, where the generator is in the state in which it was before the forward."""
        flat, a = x.reshape(-1, x.shape[-1]), self._joined_a(factors, x.dtype)
        of_x = torch.zeros_like(flat) if wants_x else None  # (N, I)
        of_factors = [torch.zeros_like(factor) for factor in factors]
        for index, (member, gradient, place) in enumerate(zip(self.members, gradients, self.places, strict=True)):
            mask = F.dropout(torch.ones_like(flat), dropout)  # (N, I): drawn, whether there is a gradient or not
            if gradient is None:
                continue
            g, dropped = gradient.reshape(-1, gradient.shape[-1]), flat * mask  # (N, O), (N, I)
            through = (g @ self._b(index, factors, x.dtype)).mul_(member.scaling)  # (N, R)
            of_factors[2 * index].copy_(through.t() @ dropped)
            of_factors[2 * index + 1].copy_((g.t() @ (dropped @ a[place].t())).mul_(member.scaling))
            del dropped
            if of_x is not None:
                of_x.addcmul_(through @ a[place], mask).addmm_(g, product_matrix(member.base, x.dtype))
        return None if of_x is None else of_x.view(x.shape), of_factors


def generator_state(device: torch.device) -> Tensor:
    """Of the generator that draws on this device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def drawing_from(state: Tensor, device: torch.device) -> Iterator[None]:
    """Inside the block the generator goes on from `state`; it is as before after it."""
    before = generator_state(device)
    _set_generator(state, device)
    try:
        yield
    finally:
        _set_generator(before, device)


def _set_generator(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Products, dropout: float, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.dropout = group, dropout
        ctx.state = generator_state(x.device) if dropout else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *factors)
        return tuple(group.forward(x, factors, dropout))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        wants_x = ctx.needs_input_grad[2]
        return None, None, *_backward(ctx.group, x, factors, gradients, wants_x, ctx.dropout, ctx.state)


def _backward(
    group: Products,
    x: Tensor,
    factors: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wants_x: bool,
    dropout: float,
    state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """dx, then the factors' gradients."""
    if state is None:
        of_x, of_factors = group.backward(x, factors, gradients, wants_x)
    else:
        with drawing_from(state, x.device):
            of_x, of_factors = group.dropped_backward(x, factors, gradients, wants_x, dropout)
    return of_x, *of_factors


def products(group: Products, x: Tensor, factors: Sequence[Tensor], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """The output of each layer of the group."""
    outputs: tuple[Tensor, ...] = _Products.apply(group, dropout, x, *factors)  # type: ignore[no-untyped-call]
    return outputs


@dataclass(frozen=True, eq=False)
class Gated:
    """y = down(act(gate(x)) * up(x)); `inner` is gate and up."""

    inner: Products
    activation: Callable[[Tensor], Tensor]
    down: Products


class _Gated(torch.autograd.Function):
    """Keeps x, gate and up; the activation and its product with up are made again."""

    @staticmethod
    def forward(ctx: Any, gated: Gated, dropout: float, x: Tensor, *factors: Tensor) -> Tensor:
        ctx.gated, ctx.dropout = gated, dropout
        ctx.inner_state = generator_state(x.device) if dropout else None
        gate, up = gated.inner.forward(x, factors[:4], dropout)
        ctx.down_state = generator_state(x.device) if dropout else None
        ctx.save_for_backward(x, gate, up, *factors)
        return gated.down.forward(gated.activation(gate).mul_(up), factors[4:], dropout)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gated, (x, gate, up, *factors) = ctx.gated, ctx.saved_tensors
        with torch.enable_grad():
            source = gate.detach().requires_grad_()
            activated = gated.activation(source)
        active = activated.detach()  # (..., H)
        of_hidden: Any
        of_hidden, *of_down = _backward(
            gated.down, active * up, factors[4:], gradients, True, ctx.dropout, ctx.down_state
        )
        of_up = of_hidden * active
        (of_gate,) = torch.autograd.grad(activated, source, of_hidden.mul_(up))
        del activated, active, of_hidden
        of_both, wants_x = (of_gate, of_up), ctx.needs_input_grad[2]
        of_inner = _backward(gated.inner, x, factors[:4], of_both, wants_x, ctx.dropout, ctx.inner_state)
        return None, None, *of_inner, *of_down


def gated_product(gated: Gated, x: Tensor, factors: Sequence[Tensor], dropout: float = 0.0) -> Tensor:
    """The MLP's output. `factors`: A and B of gate, up and down."""
    output: Tensor = _Gated.apply(gated, dropout, x, *factors)  # type: ignore[no-untyped-call]
    return output
