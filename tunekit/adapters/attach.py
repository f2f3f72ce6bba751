"""Puts an adapter into a base and holds on to it: state by name, optimizer groups, hooks, and the way back."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters.base import KINDS, AdapterPart, Casts, LayerAdapter, ModelAdapter, SharedPart, Slot, Wrapper
from tunekit.adapters.copies import TrainedCopy
from tunekit.adapters.expert_parameters import ParameterAdapter, ParameterHost, own_parameter
from tunekit.adapters.kernels.norms import lighten_norms
from tunekit.adapters.method import Method, load_method
from tunekit.adapters.module_names import base_modules
from tunekit.adapters.targets import find_targets
from tunekit.adapters.tokens import TrainedTokens, token_rows
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError
from tunekit.model.call import current_call, seed_for
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.training import TrainingSection
from tunekit.records import Target


class AttachedAdapter:
    """An adapter in place. Only its tensors require a gradient; every name is sorted."""

    def __init__(self, net: nn.Module, settings: AdapterSettings, method: Method, targets: list[Target]) -> None:
        self.net, self.settings, self.method, self.targets = net, settings, method, targets
        self.head_name: str | None = None
        self.shared: SharedPart[Any] | None = None
        self.layers: dict[str, LayerAdapter[Any]] = {}
        self.parameters: dict[str, ParameterAdapter[Any]] = {}
        self.copies: dict[str, TrainedCopy] = {}
        self.tokens: dict[str, TrainedTokens] = {}
        self.tied_tokens: dict[str, list[str]] = {}  # of those, the modules that use their rows
        self.model_adapter: ModelAdapter[Any] | None = None
        self.added_rows: Tensors = {}  # of a folder for a larger vocabulary: module -> rows beyond the base's
        self.casts = Casts()
        self.joined: list[tuple[str, ...]] = []  # names of layers that are computed together
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []  # parent, own name, what stood there
        self._parents: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in net.modules():
            for own, child in parent.named_children():
                self._parents.setdefault(id(child), []).append((parent, own))

    def parts(self) -> list[AdapterPart]:
        """Everything with state."""
        whole = [part for part in (self.shared, self.model_adapter) if part is not None]
        return [*whole, *self.layers.values(), *self.parameters.values(), *self.copies.values(), *self.tokens.values()]

    def slots(self) -> dict[str, tuple[type[AdapterPart], Slot]]:
        """Every tensor of the state as it was declared, by full name."""
        found = {part.name_of(slot): (type(part), slot) for part in self.parts() for slot in part.declared.values()}
        return dict(sorted(found.items()))

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors, float32, sorted by name."""
        found = self._tensors(("trained",))
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, nn.Parameter)}

    def state(self, kinds: Sequence[str] = KINDS) -> Tensors:
        """State of these kinds (trained, saved, resume) without gradient, sorted by name; not copies."""
        return {name: tensor.detach() for name, tensor in self._tensors(kinds).items()}

    def exported(self) -> Tensors:
        """What the adapter's file holds, by name."""
        return {name: tensor for part in self.parts() for name, tensor in part.exported().items()}

    def _tensors(self, kinds: Sequence[str]) -> Tensors:
        found = {name: tensor for part in self.parts() for name, tensor in part.state(kinds).items()}
        return dict(sorted(found.items()))

    def load_state(self, tensors: Mapping[str, Tensor], kinds: Sequence[str] = KINDS) -> None:
        """Fill the state in place from tensors of exactly these names and shapes.

        Raises: AdapterError naming every missing, extra or misshaped tensor, before anything is changed.
        """
        own = self._tensors(kinds)
        wrong = [f"{name} is missing" for name in own if name not in tensors]
        wrong += [f"{name} has no place" for name in tensors if name not in own]
        wrong += [
            f"{name} has shape {list(tensors[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ]
        if wrong:
            raise AdapterError(f"the state does not fit this adapter: {'; '.join(wrong[:5])} ({len(wrong)} in all)")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        for part in self.parts():
            part.check_state()

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """A block in which the whole state is these tensors. Nothing is copied, and the state keeps its storage."""
        state = self._tensors(KINDS)
        before = {name: tensor.data for name, tensor in state.items()}
        try:
            for name, tensor in state.items():
                tensor.data = tensors[name]
            yield
        finally:
            for name, tensor in state.items():
                tensor.data = before[name]

    def groups(self, training: TrainingSection) -> list[tuple[tuple[str, ...], float, bool]]:
        """Optimizer groups (names, learning-rate multiplier, whether weight decay applies): every trained name once.

        LoRA+ (Hayou et al. 2024) multiplies the rate of the matrices on the output side. The factors of an embedding
        form a group of their own at the plain rate: its input is one-hot, so that the width argument does not apply.
        """
        grouped: dict[tuple[str, bool], list[str]] = {}
        for name, (_, slot) in self.slots().items():
            if slot.kind == "trained":
                rate = slot.rate if training.loraplus_ratio is not None else ""
                grouped.setdefault((rate, slot.decays), []).append(name)
        ratio = training.loraplus_ratio or 1.0
        return [
            (tuple(names), ratio if rate == "b" else 1.0, decays) for (rate, decays), names in sorted(grouped.items())
        ]

    def starts_as_identity(self) -> bool:
        """Whether the bypassed adapter is the model at step 0."""
        return all(part.starts_as_identity for part in self.parts())

    def penalty(self) -> Tensor | None:
        """() float32: sum of the parts' penalties, or None."""
        return total_penalty(self.parts())

    def after_backward(self) -> None:
        """Once per optimizer step, before clipping."""
        for part in self.parts():
            part.after_backward()

    def after_step(self, step: int, total_steps: int) -> None:
        """After the update of `step` (0-based)."""
        for part in self.parts():
            part.after_step(step, total_steps)

    def inputs(self, inputs: Tensors) -> Tensors:
        """What the network is called with, changed by a whole-model adapter."""
        if self.model_adapter is None or current_call().bypassed:
            return inputs
        return self.model_adapter.inputs(self.net, inputs)

    @property
    def virtual_tokens(self) -> int:
        """Positions that stand before each row, of those that the network has."""
        if self.model_adapter is None or current_call().bypassed:
            return 0
        return self.model_adapter.virtual_tokens(self.settings)

    def outputs(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D), or logits, of the real positions."""
        if self.model_adapter is None or current_call().bypassed:
            return hidden
        return self.model_adapter.outputs(hidden)

    def put(self, name: str, wrapper: nn.Module) -> None:
        """Put a wrapper wherever the base holds the module of this name."""
        old = self.net.get_submodule(name)
        wrapper.train(old.training)
        for parent, own in self._parents[id(old)]:
            setattr(parent, own, wrapper)
            self._replaced.append((parent, own, old))

    def placed(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """Each wrapper in place: the module that holds it, under which name, the wrapper."""
        return [(parent, own, getattr(parent, own)) for parent, own, _ in self._replaced]

    def detach(self) -> None:
        """Take the adapter out: the plain base stands again, module for module. The state stays here."""
        for parent, own, old in reversed(self._replaced):
            setattr(parent, own, old)
        self._replaced.clear()
        if self.model_adapter is not None:
            self.model_adapter.detach(self.net)


def total_penalty(parts: Iterable[AdapterPart]) -> Tensor | None:
    """() float32: the sum of the parts' penalties, or None."""
    found = [penalty for part in parts for penalty in [part.penalty()] if penalty is not None]
    return torch.stack(found).sum() if found else None


def attach_adapter(
    net: nn.Module,
    settings: AdapterSettings,
    *,
    seed: int,
    head_name: str | None,
    device: torch.device | None = None,
    method: Method | None = None,
    targets: list[Target] | None = None,
    finished: bool = False,
    filled: bool = False,
) -> AttachedAdapter:
    """Freeze the base and put a fresh adapter into it, in place.

    Each tensor's first value depends on the seed and its module's name alone. `device`: where its tensors lie;
    by default where the base lies (on a meta base they have no values). `finished`: nothing but what folders hold.
    `filled`: the caller loads the whole state afterwards.
    Raises: RecipeError where an entry of the settings fits nothing.
    """
    method = method or load_method(settings.method)
    if targets is None:
        targets = find_targets(net, settings, head_name=head_name, method=method)
    attached = AttachedAdapter(net, settings, method, targets)
    attached.head_name = head_name
    net.requires_grad_(False)
    meta = device.type == "meta" if device else _device_of(net).type == "meta"
    _build(attached, meta, finished)
    for part in attached.parts():
        if part.declared and not meta:
            if not (filled or (finished and isinstance(part, ModelAdapter))):  # else the folder has all of its values
                part.initialise(torch.Generator("cpu").manual_seed(seed_for("adapter", seed, part.module_name)))
            part.move(device or _home(part, net))
    if method.kernel is not None:
        attached.joined = method.kernel.join(net, attached.layers, settings, targets, attached.casts)
    lighten_norms(net)
    return attached


def _home(part: AdapterPart, net: nn.Module) -> torch.device:
    """Where the part's own piece of the base lies."""
    if isinstance(part, ParameterAdapter):
        return part.parameter.device
    return _device_of(part.base_layer if isinstance(part, Wrapper) else net)


def _build(attached: AttachedAdapter, meta: bool, finished: bool) -> None:
    """Make every part and put the wrappers in place."""
    net, settings, method, targets = attached.net, attached.settings, attached.method, attached.targets
    copied, rows = method.copied_modules(base_modules(net), settings, targets), token_rows(net, settings)
    if method.shared is not None:
        attached.shared = method.shared(settings, targets, meta=meta)
    hosts: dict[str, dict[str, ParameterAdapter[Any]]] = {}
    for target in targets:
        if target.kind == "parameter":
            assert method.parameter is not None
            _, own, parameter = own_parameter(net, target.name)
            attached.parameters[target.name] = method.parameter(parameter, settings, target, meta=meta)
            hosts.setdefault(target.name.rpartition(".")[0], {})[own] = attached.parameters[target.name]
        else:
            assert method.layer is not None
            base = net.get_submodule(target.name)
            attached.layers[target.name] = method.layer(base, settings, target, attached.shared, meta=meta)
            attached.put(target.name, attached.layers[target.name])
    if attached.shared is not None:
        attached.shared.take_layers(attached.layers)
    for name, adapters in hosts.items():
        attached.put(name, ParameterHost(net.get_submodule(name), adapters))
    for name, only in copied.items():
        attached.copies[name] = method.copy_class(settings, name)(net.get_submodule(name), name, only, meta=meta)
        attached.put(name, attached.copies[name])
    for name, chosen in sorted(rows.items(), key=lambda each: each[1].owner is not None):  # owners first
        owner = attached.tokens[chosen.owner] if chosen.owner else None
        part = TrainedTokens(net.get_submodule(name), name, chosen, owner, meta=meta)
        if chosen.owner is None:
            attached.tokens[name] = part
        else:
            attached.tied_tokens.setdefault(chosen.owner, []).append(name)
        attached.put(name, part)
    if method.model is not None:
        attached.model_adapter = method.model(net, settings, meta=meta, finished=finished)
        attached.model_adapter.attach(net)


def _device_of(module: nn.Module) -> torch.device:
    """Where a module's first tensor lies."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        return tensor.device
    return torch.device("cpu")
