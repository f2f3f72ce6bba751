"""Adapters of a parameter that is not the weight of a layer: the fused weights (E, O, I) of all experts of a mixture,
or a router's matrix (O, I).

The module that owns the parameter W is wrapped. During its forward it reads W + delta in place of W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.adapters.base import AdapterPart, Settings, Slots, Wrapper
from tunekit.model.call import current_call
from tunekit.records import Target

EVERYTHING = slice(None)
Index = int | slice | Tensor  # of experts
Factors = tuple[Tensor, Tensor]
FROM_THE_LEFT = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul)  # f(x, W): x is multiplied by W untransposed
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
ALIGNED_RANK = 8  # the grouped product needs strides of 16 bytes


class ParameterAdapter(AdapterPart, Generic[Settings]):
    """The change of one parameter. A subclass defines `slots`, `initialise`, and `factors` or `delta`."""

    parameter: nn.Parameter

    def __init__(self, parameter: nn.Parameter, settings: Settings, target: Target, *, meta: bool = False) -> None:
        super().__init__()
        self.settings, self.target = settings, target
        self.__dict__["parameter"] = parameter  # the base's; neither trained nor saved with the adapter
        self.declare(target.name, self.slots(settings, target), meta=meta)

    @classmethod
    def slots(cls, settings: Settings, target: Target) -> Slots:
        """Declares the tensors. They depend only on settings and shapes; `target.experts` is the number of experts
        E."""
        raise NotImplementedError

    def factors(self, index: Index) -> Factors | None:
        """Two float32 factors, L (..., P, R) and R (..., R, Q), whose product is the change of parameter[index]. None
        if the change has no factors; then `delta` computes it."""
        return None

    def delta(self, index: Index) -> Tensor:
        """The change of parameter[index], in float32."""
        factors = self.factors(index)
        assert factors is not None, "a subclass defines factors or delta"
        return factors[0] @ factors[1]

    def merged(self, parameter: Tensor) -> Tensor:
        """The whole parameter (E, O, I) with the adapter's change. `parameter`: the base's values in float32."""
        return parameter + self.delta(EVERYTHING).detach().to(parameter.device)


class ParameterHost(Wrapper):
    """Wraps the module that owns the adapted parameters. When the module's forward reads such a parameter, it gets the
    changed parameter."""

    def __init__(self, base: nn.Module, adapters: dict[str, ParameterAdapter[Any]]) -> None:
        super().__init__(base)
        self.adapters = nn.ModuleDict(adapters)  # parameter's own name -> adapter

    def forward(self, *inputs: object, **named: object) -> object:
        if current_call().bypassed:
            return self.base_layer(*inputs, **named)
        attributes = self.base_layer.__dict__  # instance attributes take precedence over registered parameters
        attributes.update({name: ChangedParameter(adapter) for name, adapter in self.adapters.items()})  # type: ignore[arg-type]
        try:
            return self.base_layer(*inputs, **named)
        finally:
            for name in self.adapters:
                del attributes[name]


def fused_shape(owner: nn.Module, parameter: Tensor) -> tuple[int | None, int, int]:
    """The shape (E, O, I) of a fused parameter, or (None, O, I) of a matrix. Modules that store (E, I, O) declare this
    with `is_transposed`."""
    if parameter.dim() == 2:
        return None, *parameter.shape
    experts, rows, columns = parameter.shape
    return (experts, columns, rows) if stored_transposed(owner) else (experts, rows, columns)


def stored_transposed(owner: nn.Module) -> bool:
    """Whether the module stores (E, I, O)."""
    return bool(getattr(owner, "is_transposed", False))


def own_parameter(net: nn.Module, name: str) -> tuple[nn.Module, str, nn.Parameter]:
    """The module that owns a parameter, the parameter's own name, and the parameter."""
    owner_name, _, own_name = name.rpartition(".")
    owner = net.get_submodule(owner_name)
    return owner, own_name, owner.get_parameter(own_name)


class ChangedParameter:
    """Stands for a parameter W plus the adapter's change. The module gets this object when it reads W, and may index or
    transpose it.

    In a product with an input, W and the factors of its change are multiplied one after the other: W x + L (R x). Any
    other use computes the changed matrix.
    """

    def __init__(self, adapter: ParameterAdapter[Any], index: Index = EVERYTHING, is_transposed: bool = False) -> None:
        self.adapter, self.index, self.is_transposed = adapter, index, is_transposed

    @property
    def original(self) -> Tensor:
        """The base's W[index], without the adapter's change: (..., P, Q), or (..., Q, P) if transposed."""
        parameter: Tensor = self.adapter.parameter
        weight = parameter if self.index is EVERYTHING else parameter[self.index]
        return weight.transpose(-2, -1) if self.is_transposed else weight

    def factors(self, dtype: torch.dtype) -> Factors | None:
        """The factors L and R in `dtype`; their product is the change of `original`."""
        factors = self.adapter.factors(self.index)
        if factors is None:
            return None
        left, right = (factor.to(dtype) for factor in factors)
        return (right.transpose(-2, -1), left.transpose(-2, -1)) if self.is_transposed else (left, right)

    def materialise(self) -> Tensor:
        """The changed matrix, in the shape of `original`."""
        delta = self.adapter.delta(self.index).to(self.adapter.parameter.dtype)
        return self.original + (delta.transpose(-2, -1) if self.is_transposed else delta)

    def __getitem__(self, index: Index) -> Tensor | ChangedParameter:
        is_unindexed = self.index is EVERYTHING and not self.is_transposed and self.adapter.parameter.dim() == 3
        if is_unindexed and isinstance(index, int | Tensor):
            return ChangedParameter(self.adapter, index)
        return self.materialise()[index]

    def transpose(self, first: int, second: int) -> Tensor | ChangedParameter:
        """The parameter with two dimensions exchanged. If these are the last two, its change is still stored as
        factors."""
        if {first, second} == {-2, -1}:
            return ChangedParameter(self.adapter, self.index, not self.is_transposed)
        return self.materialise().transpose(first, second)

    def __getattr__(self, name: str) -> object:
        if name in ("dtype", "device"):
            return getattr(self.adapter.parameter, name)
        uses_values = callable(getattr(Tensor, name, None)) and name not in FACTS
        return getattr(self.materialise() if uses_values else self.original, name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        inputs: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> object:
        product = _product(function, inputs, named or {})
        if product is not None:
            return product

        def materialised(value: object) -> object:
            return value.materialise() if isinstance(value, ChangedParameter) else value

        return function(
            *map(materialised, inputs), **{key: materialised(value) for key, value in (named or {}).items()}
        )


def _product(function: Callable[..., Any], inputs: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """Computes the product of an input and a changed parameter. Returns None if the call is not such a product."""
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
        y = function(x, changed.original) + function(function(x, left), right)
    elif function in FROM_THE_LEFT:
        y = function(changed.original, x) + function(left, function(right, x))
    elif function is F.linear and second:
        y = function(x, changed.original, *inputs[2:], **named) + function(function(x, right), left)
    elif function is torch._grouped_mm and second:
        left, right = _align(left, right)
        offsets = named["offs"]
        y = function(x, changed.original, **named) + function(function(x, left, offs=offsets), right, offs=offsets)
    return y


def _align(left: Tensor, right: Tensor) -> Factors:
    """Pads the rank R of the factors (E, P, R) and (E, R, Q) with zeros, and gives both the memory layout that torch's
    grouped product requires."""
    missing = -left.shape[-1] % ALIGNED_RANK
    left = F.pad(left, (0, missing)).contiguous()
    return left, F.pad(right.transpose(-2, -1), (0, missing)).contiguous().transpose(-2, -1)
