"""Computes one module of a network in a forward whose rows have different adapters. The base module's output is
computed once for all rows.

An additive adapter adds its update to the output of its rows. Other adapters, such as DoRA, compute the complete output
of their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters.base import LayerAdapter
from tunekit.adapters.copies import TrainedCopy
from tunekit.adapters.kernels.row_products import CopyMemory, FactorBank, NamedLayers, RowSegments, add_updates
from tunekit.adapters.tokens import TrainedTokens
from tunekit.errors import AdapterError
from tunekit.model.families.structure import text_net

RowNames = tuple[str | None, ...]  # the adapter of each row; None: the base
FindWrapper = Callable[[str], nn.Module | None]  # adapter's name -> its wrapper of a module
MOST_ROWS = 3  # an adapter with more rows is not in the batched product, which pads all adapters to the same number
CACHED_ROUTES = 2
PROBE_SHAPE = (2, 3)  # rows and tokens


@dataclass(frozen=True)
class Route:
    """The plan with which one module computes rows of several adapters.

    `separate`: the wrappers of adapters that are not additive, with the numbers of their rows.
    `others`: all other rows, which use the base module's output; None if there are none.
    `order`: reorders the outputs of `separate` and `others` to the order of the batch; None if `separate` is empty.
    `single`: additive layers whose update is computed separately, with the numbers of their rows.
    `joined`: layers whose updates one batched product computes; `segments`: the rows of these layers.
    """

    separate: list[tuple[nn.Module, Tensor]]
    others: Tensor | None
    order: Tensor | None
    single: list[tuple[LayerAdapter[Any], Tensor]]
    joined: NamedLayers
    segments: RowSegments | None

    def compute(self, x: Tensor, base: nn.Module, bank: FactorBank) -> Tensor:
        """The module's output. Shapes: x (B, T, I), or ids (B, T) -> (B, T, O)."""
        y = self._products(x, base)
        if not self.single and self.segments is None:
            return y
        y = y.clone() if torch.is_grad_enabled() else y  # changed in place below
        for layer, rows in self.single:
            y.index_add_(0, rows, layer.update(x.index_select(0, rows)).to(y.dtype))
        if self.segments is not None:
            add_updates(y, x, bank.stack(self.joined, x.dtype), self.segments)
        return y

    def _products(self, x: Tensor, base: nn.Module) -> Tensor:
        """The module's output before additive updates: the outputs of the separate wrappers, and of the base module for
        all other rows."""
        if self.order is None:
            return base(x)
        parts = [wrapper(x.index_select(0, rows)) for wrapper, rows in self.separate]
        if self.others is not None:
            parts.append(base(x.index_select(0, self.others)))
        return torch.cat(parts).index_select(0, self.order)


def make_route(names: RowNames, find: FindWrapper, bank: FactorBank, device: torch.device) -> Route:
    """Plans how one module computes a batch. `names`: the adapter of each row. `find`: returns an adapter's wrapper of
    the module."""
    layers = {name: wrapper for name in dict.fromkeys(names) if name is not None and (wrapper := find(name))}
    rows: dict[str | None, list[int]] = {}
    for number, name in enumerate(names):
        rows.setdefault(name if name in layers else None, []).append(number)
    added = {name: layer for name, layer in layers.items() if isinstance(layer, LayerAdapter) and layer.is_additive}
    separate = [name for name in layers if name not in added]
    joined = bank.arrange([n for n, layer in added.items() if len(rows[n]) <= MOST_ROWS and _joins(layer)])
    apart = [number for name in separate for number in rows[name]]
    others = sorted({*range(len(names))} - {*apart})

    def indices(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=device)

    return Route(
        [(layers[name], indices(rows[name])) for name in separate],
        indices(others) if others else None,
        indices(apart + others).argsort() if separate else None,
        [(layer, indices(rows[name])) for name, layer in added.items() if name not in joined],
        {name: added[name] for name in joined},
        RowSegments.of([rows[name] for name in joined], len(names), device) if joined else None,
    )


def _joins(layer: LayerAdapter[Any]) -> bool:
    drops = layer.training and bool(getattr(layer.settings, "dropout", 0.0))
    return layer.is_thin and not drops


class Router:
    """Computes one module for rows of several adapters. It caches the plans (Route) and the copies of factors."""

    def __init__(self, copies: CopyMemory) -> None:
        self.bank = FactorBank(copies)
        self._routes: dict[object, Route] = {}  # the last ones: of prompts and of new tokens

    def forget(self, name: str) -> None:
        """Drop cached copies and routes after an adapter was added or removed."""
        self.bank.forget(name)
        self._routes.clear()

    def __call__(self, x: Tensor, names: RowNames, base: nn.Module, find: FindWrapper) -> Tensor:
        """The module's output for x (B, T, I), or for ids (B, T).

        Raises: AdapterError if x has a different number of rows than the call.
        """
        if len(x) != len(names):
            what = f"the call has the adapters of {len(names)} rows, but a layer's input has {len(x)} rows"
            raise AdapterError(what, "this base cannot mix adapters in a batch: use one adapter at a time")
        key = names, base.training, x.device
        if key not in self._routes:
            self._routes = dict(list(self._routes.items())[1 - CACHED_ROUTES :])
            self._routes[key] = make_route(names, find, self.bank, x.device)
        return self._routes[key].compute(x, base, self.bank)


def can_route(wrapper: nn.Module) -> bool:
    """Whether the wrapper computes each row of a tensor independently, provided that the wrapped module does."""
    return isinstance(wrapper, LayerAdapter | TrainedCopy | TrainedTokens)


@torch.no_grad()
def row_modules(net: nn.Module) -> set[nn.Module]:
    """The modules without children whose only input is one tensor with the same rows and tokens as the net's ids (B,
    T). A test forward shows which modules these are.

    Experts, for example, are not among them: they get single tokens of all rows.
    """
    fitting, unfit = set[nn.Module](), set[nn.Module]()

    def look(module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        fits = len(inputs) == len(tensors) == 1 and not named and tensors[0].shape[:2] == PROBE_SHAPE
        (fitting if fits else unfit).add(module)

    leaves = [module for module in net.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in leaves]
    try:
        device = next(net.parameters()).device
        text_net(net)(input_ids=torch.zeros(PROBE_SHAPE, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return fitting - unfit
