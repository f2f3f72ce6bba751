"""Adapters of a bare parameter, such as the fused weights of all experts (E, O, I) of a mixture-of-experts block.

Comes in: the module that owns the parameter.  Goes out: a wrapper under which the module reads W + delta wherever it
reads W.  Next: changed_parameter.py, attach.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tunekit.adapters.base import Part, Slot, Wrapper
from tunekit.adapters.changed_parameter import EVERYTHING, ChangedParameter, Factors
from tunekit.model.call import current_call
from tunekit.records import Target


class ParameterAdapter(Part):
    """The change of one parameter. A subclass gives `slots`, `initialise`, and `factors` or `delta`."""

    parameter: nn.Parameter

    def __init__(self, parameter: nn.Parameter, settings: Any, target: Target, *, meta: bool = False) -> None:
        super().__init__()
        self.settings, self.target = settings, target
        self.__dict__["parameter"] = parameter  # the base's own, not ours to train or to save
        self.hold(target.name, self.slots(settings, target), meta=meta)

    @classmethod
    def slots(cls, settings: Any, target: Target) -> dict[str, Slot]:
        """The state, from settings and shapes alone; `target.experts` is E."""
        raise NotImplementedError

    def factors(self, index: Any) -> Factors | None:
        """L (..., P, R) and R (..., R, Q), whose product is the change of parameter[index], float32; None: `delta`."""
        return None

    def delta(self, index: Any) -> Tensor:
        """The change of parameter[index], in the adapter's float32."""
        factors = self.factors(index)
        assert factors is not None, "a subclass gives factors or delta"
        return factors[0] @ factors[1]

    def merged(self, parameter: Tensor) -> Tensor:
        """The whole changed parameter (E, O, I) from the float32 `parameter`."""
        return parameter + self.delta(EVERYTHING).detach().to(parameter.device)


class ParameterHost(Wrapper):
    """Wraps the owning module; during its forward the named parameters read as changed."""

    def __init__(self, base: nn.Module, adapters: dict[str, ParameterAdapter]) -> None:
        super().__init__(base)
        self.adapters = nn.ModuleDict(adapters)  # parameter's own name -> adapter

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """An entry in the instance's own dictionary is found before the registered parameter."""
        own = self.base_layer.__dict__
        own.update({name: ChangedParameter(adapter) for name, adapter in self.adapters.items()})  # type: ignore[arg-type]
        try:
            yield
        finally:
            for name in self.adapters:
                del own[name]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if current_call().bypassed:
            return self.base_layer(*inputs, **named)
        with self._changed():
            return self.base_layer(*inputs, **named)


def fused_shape(owner: nn.Module, parameter: Tensor) -> tuple[int, int, int]:
    """(E, O, I) of a fused parameter; some blocks store (E, I, O) and say so with `is_transposed`."""
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
