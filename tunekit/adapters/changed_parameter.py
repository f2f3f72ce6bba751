"""A parameter that reads as changed without the changed matrix being made.

Comes in: a ParameterAdapter.  Goes out: a stand-in for its parameter.  Next: fused_parameters.py puts it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tunekit.adapters.expert_parameters import ParameterAdapter

EVERYTHING = slice(None)
Factors = tuple[Tensor, Tensor]
FROM_THE_LEFT = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul)  # f(x, W): x is multiplied by W as it is
FACTS = (
    "data_ptr",
    "dim",
    "element_size",
    "is_contiguous",
    "is_floating_point",
    "ndimension",
    "numel",
    "size",
    "stride",
)
ALIGNED_RANK = 8  # the grouped product wants strides of 16 bytes


class ChangedParameter:
    """Stands where a module reads its parameter W; what it indexes or transposes is a stand-in too.

    Multiplied with an input, W and the factors of its change are multiplied one after the other: W x + L (R x). Any
    other use makes the changed matrix.
    """

    def __init__(self, adapter: ParameterAdapter, index: Any = EVERYTHING, flipped: bool = False) -> None:
        self.adapter, self.index, self.flipped = adapter, index, flipped

    @property
    def plain(self) -> Tensor:
        """W[index], (..., P, Q), of flipped (..., Q, P)."""
        parameter: Tensor = self.adapter.parameter
        weight = parameter if self.index is EVERYTHING else parameter[self.index]
        return weight.transpose(-2, -1) if self.flipped else weight

    def factors(self, dtype: torch.dtype) -> Factors | None:
        """L and R in `dtype`, whose product is the change of `plain`."""
        found = self.adapter.factors(self.index)
        if found is None:
            return None
        left, right = (factor.to(dtype) for factor in found)
        return (right.transpose(-2, -1), left.transpose(-2, -1)) if self.flipped else (left, right)

    def whole(self) -> Tensor:
        """The changed matrix, shaped as `plain`."""
        delta = self.adapter.delta(self.index).to(self.adapter.parameter.dtype)
        return self.plain + (delta.transpose(-2, -1) if self.flipped else delta)

    def __getitem__(self, index: Any) -> Any:
        if self.index is EVERYTHING and not self.flipped and isinstance(index, int | Tensor):
            return ChangedParameter(self.adapter, index)
        return self.whole()[index]

    def transpose(self, first: int, second: int) -> Any:
        """With the last two dimensions exchanged it stays a stand-in."""
        if {first, second} == {-2, -1}:
            return ChangedParameter(self.adapter, self.index, not self.flipped)
        return self.whole().transpose(first, second)

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device"):
            return getattr(self.adapter.parameter, name)
        used = callable(getattr(Tensor, name, None)) and name not in FACTS
        return getattr(self.whole() if used else self.plain, name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], inputs: Any = (), named: Any = None
    ) -> Any:
        product = _product(function, inputs, named or {})
        if product is not None:
            return product

        def whole(value: Any) -> Any:
            return value.whole() if isinstance(value, ChangedParameter) else value

        return function(*map(whole, inputs), **{key: whole(value) for key, value in (named or {}).items()})


def _product(function: Callable[..., Any], inputs: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """The product of an input and a changed parameter, or None where the call is none."""
    if len(inputs) < 2 or isinstance(inputs[0], ChangedParameter) == isinstance(inputs[1], ChangedParameter):
        return None
    second = isinstance(inputs[1], ChangedParameter)
    changed, x = (inputs[1], inputs[0]) if second else (inputs[0], inputs[1])
    factors = changed.factors(x.dtype)
    if factors is None:
        return None
    left, right = factors
    y: Tensor | None = None
    if function in FROM_THE_LEFT and second:
        y = function(x, changed.plain) + function(function(x, left), right)
    elif function in FROM_THE_LEFT:
        y = function(changed.plain, x) + function(left, function(right, x))
    elif function is F.linear and second:
        y = function(x, changed.plain, *inputs[2:], **named) + function(function(x, right), left)
    elif function is torch._grouped_mm and second:
        left, right = _aligned(left, right)
        offsets = named["offs"]
        y = function(x, changed.plain, **named) + function(function(x, left, offs=offsets), right, offs=offsets)
    return y


def _aligned(left: Tensor, right: Tensor) -> Factors:
    """The same factors (E, P, R) and (E, R, Q), R filled up with zeros, in memory as the grouped product wants them."""
    more = -left.shape[-1] % ALIGNED_RANK
    left = F.pad(left, (0, more)).contiguous()
    return left, F.pad(right.transpose(-2, -1), (0, more)).contiguous().transpose(-2, -1)
