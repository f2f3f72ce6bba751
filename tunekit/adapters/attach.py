"""Attaches an adapter to a base model. The attached adapter gives access to its tensors by name, its optimizer groups
and its hooks, and can be detached."""

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
    """An adapter that is attached to a base model. Only the adapter's tensors require a gradient. Names are always
    sorted."""

    def __init__(self, net: nn.Module, settings: AdapterSettings, method: Method, targets: list[Target]) -> None:
        self.net, self.settings, self.method, self.targets = net, settings, method, targets
        self.head_name: str | None = None
        self.shared: SharedPart[Any] | None = None
        self.layers: dict[str, LayerAdapter[Any]] = {}
        self.parameters: dict[str, ParameterAdapter[Any]] = {}
        self.copies: dict[str, TrainedCopy] = {}
        self.tokens: dict[str, TrainedTokens] = {}
        self.tied_tokens: dict[str, list[str]] = {}  # module with trained rows -> modules that share its rows
        self.model_adapter: ModelAdapter[Any] | None = None
        self.added_rows: Tensors = {}  # for an enlarged vocabulary: module -> rows added to its matrix
        self.casts = Casts()
        self.joined: list[tuple[str, ...]] = []  # names of layers that are computed together
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []  # parent, attribute, original module
        self._parents: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in net.modules():
            for attribute, child in parent.named_children():
                self._parents.setdefault(id(child), []).append((parent, attribute))

    def parts(self) -> list[AdapterPart]:
        """All parts of the adapter that have tensors."""
        network_parts = [part for part in (self.shared, self.model_adapter) if part is not None]
        return [
            *network_parts,
            *self.layers.values(),
            *self.parameters.values(),
            *self.copies.values(),
            *self.tokens.values(),
        ]

    def slots(self) -> dict[str, tuple[type[AdapterPart], Slot]]:
        """The declarations (shape, kind, initial value) of all tensors of the adapter, by full tensor name."""
        declared = {part.name_of(slot): (type(part), slot) for part in self.parts() for slot in part.declared.values()}
        return dict(sorted(declared.items()))

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors, float32, sorted by name."""
        tensors = self._tensors(("trained",))
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}

    def state(self, kinds: Sequence[str] = KINDS) -> Tensors:
        """The adapter's tensors of these kinds (trained, saved, resume), sorted by name. They are detached from
        autograd, but not copied."""
        return {name: tensor.detach() for name, tensor in self._tensors(kinds).items()}

    def file_tensors(self) -> Tensors:
        """The tensors that the adapter's file contains, by name."""
        return {name: tensor for part in self.parts() for name, tensor in part.file_tensors().items()}

    def _tensors(self, kinds: Sequence[str]) -> Tensors:
        tensors = {name: tensor for part in self.parts() for name, tensor in part.state(kinds).items()}
        return dict(sorted(tensors.items()))

    def load_state(self, tensors: Mapping[str, Tensor], kinds: Sequence[str] = KINDS) -> None:
        """Copy `tensors` into the adapter's own tensors, in place. The names and shapes of both must be equal.

        Raises: AdapterError with every missing, extra or misshaped tensor, before anything is changed.
        """
        state = self._tensors(kinds)
        wrong = [f"{name} is missing" for name in state if name not in tensors]
        wrong += [f"{name} is not part of the adapter" for name in tensors if name not in state]
        wrong += [
            f"{name} has shape {list(tensors[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in state.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ]
        if wrong:
            what = f"the state does not fit this adapter: {', '.join(wrong[:5])} ({len(wrong)} in all)"
            raise AdapterError(what, "use the settings with which the state was written, or start a new run")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])
        for part in self.parts():
            part.check_state()

    @contextmanager
    def with_state(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """A block in which the adapter computes with these tensors instead of its own. No tensor is copied. After the
        block the adapter computes with its own tensors again."""
        state = self._tensors(KINDS)
        before = {name: tensor.data for name, tensor in state.items()}
        try:
            for name, tensor in state.items():
                tensor.data = tensors[name]
            self._follow_state()
            yield
        finally:
            for name, tensor in state.items():
                tensor.data = before[name]
            self._follow_state()

    def _follow_state(self) -> None:
        for part in self.parts():
            part.follow_state()

    def groups(self, training: TrainingSection) -> list[tuple[tuple[str, ...], float, bool]]:
        """Optimizer groups as (names, learning-rate multiplier, whether weight decay applies). Every trained name
        occurs once. LoRA+ (Hayou et al. 2024) multiplies the learning rate of the output-side matrices. The factors of
        an embedding are a separate group without this multiplier: an embedding's input is one-hot, so LoRA+'s argument
        about wide layers does not apply."""
        grouped: dict[tuple[str, bool], list[str]] = {}
        for name, (_, slot) in self.slots().items():
            if slot.kind == "trained":
                rate = slot.rate if training.loraplus_ratio is not None else ""
                grouped.setdefault((rate, slot.decays), []).append(name)
        ratio = training.loraplus_ratio or 1.0
        return [
            (tuple(names), ratio if rate == "b" else 1.0, decays) for (rate, decays), names in sorted(grouped.items())
        ]

    def head_tensors(self) -> list[str]:
        """The names of trained tensors that are whole matrices of the output head."""
        heads = [copy for name, copy in self.copies.items() if name == self.head_name]
        return [copy.name_of(slot) for copy in heads for slot in copy.declared.values()]

    def starts_as_identity(self) -> bool:
        """Whether the freshly initialised adapter changes nothing, so that at step 0 the model computes the same as the
        base."""
        return all(part.starts_as_identity for part in self.parts())

    def penalty(self) -> Tensor | None:
        """The sum of the penalties of all adapter parts, a float32 scalar tensor. None if no part has a penalty."""
        return total_penalty(self.parts())

    def after_backward(self) -> None:
        """Called once per optimizer step, before the gradients are clipped."""
        for part in self.parts():
            part.after_backward()

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after the optimizer update of step `step`, counted from 0."""
        for part in self.parts():
            part.after_step(step, total_steps)

    def inputs(self, inputs: Tensors) -> Tensors:
        """The network's inputs as a whole-model adapter, such as a prompt, changes them. Other adapters leave them
        unchanged."""
        if self.model_adapter is None or current_call().bypassed:
            return inputs
        return self.model_adapter.inputs(self.net, inputs)

    @property
    def virtual_tokens(self) -> int:
        """The number of virtual tokens that the adapter puts before each row. They count towards the network's maximum
        length."""
        if self.model_adapter is None or current_call().bypassed:
            return 0
        return self.model_adapter.virtual_tokens(self.settings)

    def outputs(self, hidden: Tensor) -> Tensor:
        """Removes the positions of virtual tokens from hidden states (B, T, D) or logits."""
        if self.model_adapter is None or current_call().bypassed:
            return hidden
        return self.model_adapter.outputs(hidden)

    def put(self, name: str, wrapper: nn.Module) -> None:
        """Replace the module of this name by a wrapper, everywhere in the base."""
        module = self.net.get_submodule(name)
        wrapper.train(module.training)
        for parent, attribute in self._parents[id(module)]:
            setattr(parent, attribute, wrapper)
            self._replaced.append((parent, attribute, module))

    def wrappers(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """All attached wrappers as (parent module, attribute, wrapper)."""
        return [(parent, attribute, getattr(parent, attribute)) for parent, attribute, _ in self._replaced]

    def detach(self) -> None:
        """Detach the adapter, so that the base has its original modules again. The adapter's tensors stay in this
        object."""
        for parent, attribute, module in reversed(self._replaced):
            setattr(parent, attribute, module)
        self._replaced.clear()
        if self.model_adapter is not None:
            self.model_adapter.detach(self.net)

    def free(self) -> None:
        """Free the memory of a detached adapter, which is unusable afterwards. Its parts refer to each other, so Python
        alone would free them much later."""
        for part in self.parts():
            part.__dict__.clear()


def total_penalty(parts: Iterable[AdapterPart]) -> Tensor | None:
    """The sum of the penalties of these adapter parts, a float32 scalar tensor. None if no part has a penalty."""
    penalties = [penalty for part in parts for penalty in [part.penalty()] if penalty is not None]
    return torch.stack(penalties).sum() if penalties else None


def attach_adapter(
    net: nn.Module,
    settings: AdapterSettings,
    *,
    seed: int,
    head_name: str | None,
    device: torch.device | None = None,
    method: Method | None = None,
    targets: list[Target] | None = None,
    from_folder: bool = False,
    loads_state: bool = False,
) -> AttachedAdapter:
    """Freeze the base and attach a new adapter to it, in place.

    Each tensor's initial value depends only on the seed and its module's name. `device`: the device of the adapter's
    tensors, by default the base's device. On the meta device the tensors have no values. `from_folder`: allocate only
    the tensors that adapter folders contain.
    `loads_state`: initialise nothing, because the caller loads all tensors afterwards.
    Raises: RecipeError if an entry of the settings matches no module.
    """
    method = method or load_method(settings.method)
    if targets is None:
        targets = find_targets(net, settings, head_name=head_name, method=method)
    attached = AttachedAdapter(net, settings, method, targets)
    attached.head_name = head_name
    net.requires_grad_(False)
    meta = device.type == "meta" if device else _device_of(net).type == "meta"
    _build(attached, meta, from_folder)
    for part in attached.parts():
        if part.declared and not meta:
            # otherwise the folder contains all values
            if not (loads_state or (from_folder and isinstance(part, ModelAdapter))):
                part.initialise(torch.Generator("cpu").manual_seed(seed_for("adapter", seed, part.module_name)))
            part.move(device or _base_device(part, net))
    if method.kernel is not None:
        attached.joined = method.kernel.join(net, attached.layers, settings, targets, attached.casts)
    lighten_norms(net)
    return attached


def _base_device(part: AdapterPart, net: nn.Module) -> torch.device:
    """The device of the base module or base parameter that this part adapts."""
    if isinstance(part, ParameterAdapter):
        return part.parameter.device
    return _device_of(part.base_layer if isinstance(part, Wrapper) else net)


def _build(attached: AttachedAdapter, meta: bool, from_folder: bool) -> None:
    """Create all parts of the adapter, and replace the adapted modules of the base by wrappers."""
    net, settings, method, targets = attached.net, attached.settings, attached.method, attached.targets
    copied, rows = method.copied_modules(base_modules(net), settings, targets), token_rows(net, settings)
    if method.shared is not None:
        attached.shared = method.shared(settings, targets, meta=meta)
    hosts: dict[str, dict[str, ParameterAdapter[Any]]] = {}
    for target in targets:
        if target.kind == "parameter":
            assert method.parameter is not None
            _, own_name, parameter = own_parameter(net, target.name)
            attached.parameters[target.name] = method.parameter(parameter, settings, target, meta=meta)
            hosts.setdefault(target.name.rpartition(".")[0], {})[own_name] = attached.parameters[target.name]
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
    # modules that share their rows come first
    for name, chosen in sorted(rows.items(), key=lambda item: item[1].owner is not None):
        owner = attached.tokens[chosen.owner] if chosen.owner else None
        part = TrainedTokens(net.get_submodule(name), name, chosen, owner, meta=meta)
        if chosen.owner is None:
            attached.tokens[name] = part
        else:
            attached.tied_tokens.setdefault(chosen.owner, []).append(name)
        attached.put(name, part)
    if method.model is not None:
        attached.model_adapter = method.model(net, settings, meta=meta, from_folder=from_folder)
        attached.model_adapter.attach(net)


def _device_of(module: nn.Module) -> torch.device:
    """The device of a module's first tensor."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        return tensor.device
    return torch.device("cpu")
