"""Several adapters over one base at once, of any methods and targets: each call names one, or bypasses all.

A Switch replaces each module that an adapter wraps. It reads the adapter from the Call and passes the input to that
adapter's wrapper, or to the plain module. One forward never uses two adapters. LoRA layers then use their plain code,
so logits equal those of the adapter alone, up to the order of sums.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.base import Wrapper
from tunekit.errors import AdapterError
from tunekit.model.attention.self_attention import decoder
from tunekit.model.call import calling, current_call


class ActiveAdapter:
    """Which adapter is meant: the call's, else the one switched to (None: the base)."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.names: dict[str, bool] = {}  # name -> whether it is an adapter of the whole model
        self.hooked: str | None = None  # the one of these whose hooks are in the net

    def name(self) -> str | None:
        """The name in force.

        Raises: AdapterError for one that is not loaded, and where the hooks in the net are not this adapter's.
        """
        call = current_call()
        if call.bypassed:
            return None
        name = self.active if call.adapter is None else call.adapter
        if name is not None:
            self.check(name)
        if self.hooked != (name if self.names.get(name or "") else None):
            what = f"a call names '{name}', and the net is set up for '{self.hooked or 'adapters of layers'}'"
            raise AdapterError(what, "an adapter of the whole model is called inside AdapterSet.using, or switched to")
        return name

    def check(self, name: str) -> None:
        """Refuse a name that is not loaded."""
        if name not in self.names:
            known = ", ".join(sorted(self.names)) or "none"
            raise AdapterError(f"no adapter '{name}' is loaded", f"loaded: {known}")


class Switch(Wrapper):
    """A module of the base with the wrappers that several adapters have for it."""

    def __init__(self, base: nn.Module, choice: ActiveAdapter) -> None:
        super().__init__(base)
        self.__dict__["choice"] = choice
        self.indices: dict[str, str] = {}  # adapter's name -> its key: a name may hold dots, a key may not
        self.wrappers = nn.ModuleDict()

    def add(self, name: str, wrapper: nn.Module) -> None:
        """Take in one adapter's wrapper of this module."""
        self.indices[name] = str(len(self.indices))
        self.wrappers[self.indices[name]] = wrapper

    def forward(self, *inputs: object, **named: object) -> object:
        key = self.indices.get(self.choice.name() or "")
        return (self.base_layer if key is None else self.wrappers[key])(*inputs, **named)


class AdapterSet:
    """Adapters of one net, loaded at once. The net starts and ends plain: `remove` and `detach` take them out."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.choice = net, ActiveAdapter()
        self.adapters: dict[str, AttachedAdapter] = {}
        self._wrappers: dict[str, list[tuple[nn.Module, str, nn.Module]]] = {}
        self._standing: list[tuple[nn.Module, str, Switch]] = []
        self._guards: list[Any] = []

    def add(self, name: str, attach: Callable[[], AttachedAdapter]) -> AttachedAdapter:
        """Take in one more adapter; `attach` puts it into the net, which is plain while it runs.

        Raises: AdapterError where the name is taken, or the adapter trains a whole module inside which another has its
        layers; whatever `attach` raises. The others are then as they were.
        """
        if not name or name in self.adapters:
            raise AdapterError(f"an adapter '{name}' is loaded already" if name else "an adapter needs a name")
        hooked = self._leave()
        try:
            attached = attach()
            wrappers = attached.placed()
            attached.detach()
            self._refuse_nested(name, attached)
            self.adapters[name], self._wrappers[name] = attached, wrappers
            self.choice.names[name] = attached.model_adapter is not None
        finally:
            self._stand()
            self._hook(hooked)
        return attached

    def remove(self, name: str) -> AttachedAdapter:
        """Take one out; where it was switched to, the base is."""
        self.choice.check(name)
        if self.choice.active == name:
            self.switch(None)
        self._leave()
        del self._wrappers[name]
        del self.choice.names[name]
        self._stand()
        return self.adapters.pop(name)

    def switch(self, name: str | None) -> None:
        """The adapter of every call that names none; None: the base."""
        if name is not None:
            self.choice.check(name)
        self.choice.active = name
        self._hook(name)

    @contextmanager
    def using(self, name: str) -> Iterator[AttachedAdapter]:
        """Inside the block calls go through this adapter, whichever is switched to."""
        self.choice.check(name)
        hooked = self.choice.hooked
        self._hook(name)
        try:
            with calling(replace(current_call(), adapter=name, bypassed=False)):
                yield self.adapters[name]
        finally:
            self._hook(hooked)

    def detach(self) -> None:
        """Take all of them out; the plain base stands again, module for module."""
        self.switch(None)
        self._leave()
        self.adapters.clear()
        self._wrappers.clear()
        self.choice.names.clear()

    # An adapter of the whole model enters through hooks: they are in the net only while it is the one in force.
    def _hook(self, name: str | None) -> None:
        """Let the hooks in the net be those of this adapter; None, or one without: no hooks."""
        before, after = (self.adapters[n].model_adapter if n else None for n in (self.choice.hooked, name))
        if before is not None:
            before.detach(self.net)
        if after is not None:
            after.attach(self.net)
        self.choice.hooked = name if after is not None else None

    def _leave(self) -> str | None:
        """Make the net plain; returns whose hooks were in it."""
        hooked = self.choice.hooked
        self._hook(None)
        for parent, own, switch in self._standing:
            setattr(parent, own, switch.base_layer)
        self._standing.clear()
        for guard in self._guards:
            guard.remove()
        self._guards.clear()
        return hooked

    def _stand(self) -> None:
        """Put a Switch wherever an adapter has a wrapper; a module that is held twice gets one of its own each time."""
        found: dict[tuple[int, str], Switch] = {}
        for name, wrappers in self._wrappers.items():
            for parent, own, wrapper in wrappers:
                if (id(parent), own) not in found:
                    base = getattr(parent, own)
                    found[id(parent), own] = Switch(base, self.choice).train(base.training)
                    self._standing.append((parent, own, found[id(parent), own]))
                found[id(parent), own].add(name, wrapper)
        for parent, own, switch in self._standing:
            setattr(parent, own, switch)
        if any(self.choice.names.values()):
            self._guards.append(decoder(self.net).register_forward_pre_hook(lambda *_: self._guard()))

    def _guard(self) -> None:
        """Before every forward, where an adapter of the whole model may be meant and no Switch be asked."""
        self.choice.name()

    def _refuse_nested(self, name: str, attached: AttachedAdapter) -> None:
        """A copied module runs with other parameters under its own names, which a Switch inside it would change."""
        for other_name, other in [*self.adapters.items(), (name, attached)]:
            for one, two in ((attached, other), (other, attached)):
                names = [*two.layers, *two.copies, *two.parameters, *two.tokens]
                for copied in one.copies if one is not two else ():
                    inside = next((p for p in names if p.startswith(f"{copied}.")), None)
                    if inside is not None:
                        what = f"'{copied}' is trained whole by one and '{inside}' adapted by the other"
                        raise AdapterError(f"'{name}' and '{other_name}' cannot be loaded at once: {what}")
