"""Adapters of a bare parameter, such as the fused weights of all experts (E, O, I) of a mixture-of-experts block.

Comes in: the module that owns the parameter.  Goes out: a wrapper under which the module reads W + delta wherever it
reads W.  Next: attach.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tunekit.adapters.base import Part, Slot, Wrapper
from tunekit.decisions import Target
from tunekit.model.call import current_call


class ParameterAdapter(Part):
    """The change of one parameter. A subclass gives `slots`, `initialise` and `delta`."""

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

    def delta(self, index: Any) -> Tensor:
        """The change of parameter[index], in the adapter's float32."""
        raise NotImplementedError

    def merged(self, parameter: Tensor) -> Tensor:
        """The whole changed parameter (E, O, I) from the float32 `parameter`."""
        return parameter + self.delta(slice(None))


class ChangedParameter:
    """Stands where a module reads its parameter: indexing changes only what is read, any other use makes it whole."""

    def __init__(self, adapter: ParameterAdapter) -> None:
        self.adapter = adapter
        self.parameter: Tensor = adapter.parameter

    def __getitem__(self, index: Any) -> Tensor:
        return self.parameter[index] + self.adapter.delta(index).to(self.parameter.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self[slice(None)] if callable(getattr(Tensor, name, None)) else self.parameter, name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], inputs: Any = (), named: Any = None
    ) -> Any:
        def whole(value: Any) -> Any:
            return value[slice(None)] if isinstance(value, ChangedParameter) else value

        return function(*[whole(value) for value in inputs], **{key: whole(v) for key, v in (named or {}).items()})


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
    return (experts, columns, rows) if getattr(owner, "is_transposed", False) else (experts, rows, columns)


def own_parameter(net: nn.Module, name: str) -> tuple[nn.Module, str, nn.Parameter]:
    """The module that owns a parameter, the parameter's own name, and the parameter."""
    owner_name, _, own_name = name.rpartition(".")
    owner = net.get_submodule(owner_name)
    return owner, own_name, owner.get_parameter(own_name)
