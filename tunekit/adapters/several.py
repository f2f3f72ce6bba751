"""Several adapters on one base at the same time, with any methods and targets. Each call uses one of them, one adapter
per row, or none.

A Switch replaces each module that an adapter wraps. The Call names the adapter of all rows, or one adapter for each
row. The Switch passes the rows to the wrapper of their adapter, or to the base's module. LoRA layers inside a Switch do
not use the joined kernels, so logits equal those of the adapter alone only up to the order of sums.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any

from torch import Tensor, nn

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.base import Wrapper
from tunekit.adapters.kernels.row_products import CopyMemory
from tunekit.adapters.routing import Router, RowNames, can_route, row_modules
from tunekit.errors import AdapterConflict, AdapterError
from tunekit.model.attention.self_attention import decoder
from tunekit.model.call import calling, current_call


class ActiveAdapter:
    """The adapter in use: the adapter that the call names or, if it names none, the active adapter (None: the base)."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.names: dict[str, bool] = {}  # name -> whether it adapts the whole model
        self.hooked: str | None = None  # the whole-model adapter whose hooks are in the net

    def name(self) -> str | None:
        """The name of the adapter in use.

        Raises: AdapterError for an adapter that is not loaded, or if the hooks in the net belong to a different
        adapter.
        """
        call = current_call()
        if call.bypassed:
            return None
        name = self.active if call.adapter is None else call.adapter
        if name is not None:
            self.check(name)
        if self.hooked != (name if self.names.get(name or "") else None):
            what = f"a call uses '{name}', but the hooks in the network are for '{self.hooked or 'adapters of layers'}'"
            raise AdapterError(what, "call a whole-model adapter inside AdapterSet.using, or call AdapterSet.switch")
        return name

    def of_rows(self) -> RowNames | None:
        """The adapter of each row. None if all rows use one adapter.

        Raises: AdapterError if hooks of a whole-model adapter are in the net, because they would change all rows.
        """
        call = current_call()
        if call.adapter_of_row is not None and not call.bypassed and self.hooked is not None:
            what = f"a call has rows of several adapters, but the hooks in the network are for '{self.hooked}'"
            raise AdapterError(what, "call it inside AdapterSet.using_rows")
        return None if call.bypassed else call.adapter_of_row

    def check(self, name: str) -> None:
        """Raises: AdapterError if no adapter of this name is loaded."""
        if name not in self.names:
            known = ", ".join(sorted(self.names)) or "none"
            raise AdapterError(f"no adapter '{name}' is loaded", f"loaded: {known}")


class Switch(Wrapper):
    """Replaces a module of the base. It contains the wrappers that several adapters have for this module."""

    def __init__(self, base: nn.Module, choice: ActiveAdapter, copies: CopyMemory) -> None:
        super().__init__(base)
        self.__dict__["choice"] = choice
        self.indices: dict[str, str] = {}  # adapter's name -> its key: names may contain dots, keys may not
        self.wrappers = nn.ModuleDict()
        self._keys, self._router = count(), Router(copies)

    def add(self, name: str, wrapper: nn.Module) -> None:
        """Add one adapter's wrapper of this module."""
        self.indices[name] = str(next(self._keys))
        self.wrappers[self.indices[name]] = wrapper
        self._router.forget(name)

    def keep_copies(self, names: Collection[str]) -> None:
        """Free the copies of factors. Only copies of the adapters `names` are kept."""
        self._router.bank.keep(names)

    def find(self, name: str) -> nn.Module | None:
        """The wrapper of the adapter `name` for this module; None if it does not adapt the module."""
        return self.wrappers[self.indices[name]] if name in self.indices else None

    def remove(self, name: str) -> None:
        """Remove one adapter's wrapper."""
        del self.wrappers[self.indices.pop(name)]
        self._router.forget(name)

    def forward(self, *inputs: object, **named: object) -> object:
        if (rows := self.choice.of_rows()) is not None:
            (x,) = inputs
            assert isinstance(x, Tensor)  # `shares_forwards` is true only for such modules
            return self._router(x, rows, self.base_layer, self.find)
        key = self.indices.get(self.choice.name() or "")
        return (self.base_layer if key is None else self.wrappers[key])(*inputs, **named)


class AdapterSet:
    """The adapters that are loaded on one net. The net must have no adapter at first. `remove` and `detach` give it
    back its original modules.

    `copies`: the memory for copies of factors, in forwards whose rows have several adapters.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self.choice, self.copies = net, ActiveAdapter(), CopyMemory()
        self.adapters: dict[str, AttachedAdapter] = {}
        self._switches: dict[tuple[int, str], tuple[nn.Module, Switch]] = {}  # by parent and attribute
        self._guards: list[Any] = []

    def add(self, name: str, attach: Callable[[], AttachedAdapter]) -> AttachedAdapter:
        """Add an adapter. `attach`: a function that attaches the adapter to the net. All other adapters are removed
        from the net while it runs.

        Raises: AdapterError if the name is taken, or if a loaded adapter enlarged the vocabulary; AdapterConflict if
        the adapter copies a module inside which another adapter has layers; and the errors of `attach`. In these cases
        the other adapters stay unchanged.
        """
        if not name or name in self.adapters:
            what = f"an adapter '{name}' is loaded already" if name else "an adapter needs a name"
            raise AdapterError(what, "choose a different name" if name else "choose a name")
        if larger := [other for other, attached in self.adapters.items() if attached.added_rows]:
            what = f"'{larger[0]}' has enlarged the vocabulary of the base, so no other adapter can be loaded"
            raise AdapterError(what, "name the base as the TARGET of the command")
        hooked = self._uninstall()
        try:
            attached = attach()
            wrappers = attached.wrappers()
            attached.detach()
            self._refuse_nested(name, attached)
            for parent, attribute, wrapper in wrappers:
                self._switch(parent, attribute).add(name, wrapper)
            self.adapters[name] = attached
            self.choice.names[name] = attached.model_adapter is not None
        finally:
            self._install()
            self._hook(hooked)
        return attached

    def remove(self, name: str) -> AttachedAdapter:
        """Remove an adapter; if it is active, the base becomes active."""
        self.choice.check(name)
        if self.choice.active == name:
            self.switch(None)
        self._uninstall()
        for place, (_, switch) in list(self._switches.items()):
            if name in switch.indices:
                switch.remove(name)
            if not switch.indices:
                switch.keep_copies(())
                del self._switches[place]
        del self.choice.names[name]
        self._install()
        return self.adapters.pop(name)

    def switch(self, name: str | None) -> None:
        """Make this adapter active: calls that name no adapter use it. With None, such calls use the base alone."""
        if name is not None:
            self.choice.check(name)
        self.choice.active = name
        self._hook(name)

    @contextmanager
    def using(self, name: str) -> Iterator[AttachedAdapter]:
        """A block in which calls use this adapter, even if another adapter is active."""
        self.choice.check(name)
        hooked = self.choice.hooked
        self._hook(name)
        try:
            with calling(replace(current_call(), adapter=name, bypassed=False)):
                yield self.adapters[name]
        finally:
            self._hook(hooked)

    @contextmanager
    def using_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """A block in which row i of a forward uses the adapter names[i] (None: the base). `shares_forwards` must be
        true for all of these adapters. Weights of adapters must not change from one such block to the next."""
        for name in {*names} - {None}:
            if not self.shares_forwards(str(name)):
                raise AdapterError(f"'{name}' cannot share a forward with other adapters", "use its rows alone")
        hooked = self.choice.hooked
        self._hook(None)
        try:
            with calling(replace(current_call(), adapter_of_row=tuple(names), bypassed=False)):
                yield
        finally:
            self._hook(hooked)

    def keep_copies(self, names: Collection[str]) -> None:
        """Free the copies of factors that `using_rows` has made. Only copies of the adapters `names` are kept."""
        for _, switch in self._switches.values():
            switch.keep_copies(names)

    def shares_forwards(self, name: str) -> bool:
        """Whether rows of this adapter can be in one forward with rows of other adapters. That is the case if every
        module that the adapter wraps gets all rows in one tensor."""
        self.choice.check(name)
        wrapped = [(switch.base_layer, switch.find(name)) for _, switch in self._switches.values()]
        fits = all(can_route(wrapper) and base in self._row_modules for base, wrapper in wrapped if wrapper)
        return fits and self.adapters[name].model_adapter is None

    @cached_property
    def _row_modules(self) -> set[nn.Module]:
        """The modules of the base that get all rows in one tensor."""
        with calling(replace(current_call(), bypassed=True)):
            return row_modules(self.net)

    def detach(self) -> None:
        """Remove all adapters; the base has its own modules again."""
        self.switch(None)
        self._uninstall()
        self.keep_copies(())
        self.adapters.clear()
        self._switches.clear()
        self.choice.names.clear()

    # A whole-model adapter works through hooks, which are in the net only while the adapter is in use.
    def _hook(self, name: str | None) -> None:
        """Remove all hooks of whole-model adapters from the net. Then install the hooks of the adapter `name`, if it
        has any."""
        before, after = (self.adapters[n].model_adapter if n else None for n in (self.choice.hooked, name))
        if before is not None:
            before.detach(self.net)
        if after is not None:
            after.attach(self.net)
        self.choice.hooked = name if after is not None else None

    def _uninstall(self) -> str | None:
        """Remove all Switches, hooks and guards from the net; returns the adapter whose hooks were in the net."""
        hooked = self.choice.hooked
        self._hook(None)
        for (_, attribute), (parent, switch) in self._switches.items():
            setattr(parent, attribute, switch.base_layer)
        for guard in self._guards:
            guard.remove()
        self._guards.clear()
        return hooked

    def _install(self) -> None:
        """Replace every module that has a wrapper by its Switch. A module that occurs at two places in the net gets two
        Switches."""
        for (_, attribute), (parent, switch) in self._switches.items():
            setattr(parent, attribute, switch)
        if any(self.choice.names.values()):
            self._guards.append(decoder(self.net).register_forward_pre_hook(lambda *_: self._guard()))

    def _switch(self, parent: nn.Module, attribute: str) -> Switch:
        """The Switch of a module, which is created at the first call. At that time the net must have its original
        modules."""
        place = id(parent), attribute
        if place not in self._switches:
            base = getattr(parent, attribute)
            self._switches[place] = parent, Switch(base, self.choice, self.copies).train(base.training)
        return self._switches[place][1]

    def _guard(self) -> None:
        """Check, before every forward, that the adapter in use is the adapter whose hooks are in the net. A whole-model
        adapter may have no Switch that would check this.

        Raises: AdapterError if they differ.
        """
        if self.choice.of_rows() is None:
            self.choice.name()

    def _refuse_nested(self, name: str, attached: AttachedAdapter) -> None:
        """Refuse two adapters if one copies a module inside which the other adapts layers. The copied module runs with
        parameters that are replaced by name, and a Switch inside it would change these names.

        Raises: AdapterConflict.
        """
        for other_name, other in [*self.adapters.items(), (name, attached)]:
            for one, two in ((attached, other), (other, attached)):
                for copied in one.copies if one is not two else ():
                    names = [*two.layers, *two.copies, *two.parameters, *two.tokens]
                    nested = next((p for p in names if p.startswith(f"{copied}.")), None)
                    if nested is not None:
                        what = f"one adapter fully trains '{copied}', and the other one adapts '{nested}' inside it"
                        what = f"'{name}' and '{other_name}' cannot be loaded at once: {what}"
                        raise AdapterConflict(what, "use one of them at a time")
