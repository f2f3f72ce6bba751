"""What every adapter is made of: declared state, a layer's adapter, a module trained once for all layers, a prompt.

A module of the base, the method's settings and a Target go in; modules that can be put in place come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunekit.contracts import Tensors
from tunekit.errors import InputError
from tunekit.model.call import current_call
from tunekit.model.quantized.weights import Weight, weight_of
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.records import Target

Settings = TypeVar("Settings", bound=AdapterSettings)
KINDS = ("trained", "saved", "resume")  # trained; saved with the adapter but not trained; in checkpoints only


class NotMergeable(InputError):
    """This adapter is no change of the layer's weight and bias; the message says why."""


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter's state, declared before anything is allocated.

    `suffix` is its name in PEFT's files, after the module's; `rate` is "b" where LoRA+ speeds it up, "embedding" for
    the factors of an embedding; `decays` says whether weight decay may touch it. `first`: its value before any step;
    None: drawn as torch draws a linear layer's matrix.
    """

    suffix: str
    shape: tuple[int, ...]
    kind: str = "trained"
    decays: bool = True
    rate: str = ""
    dtype: torch.dtype = torch.float32
    first: float | None = 0.0


PeftConfig = dict[str, Any]  # fields of adapter_config.json
Slots = dict[str, Slot]  # by the attribute that holds the tensor


class AdapterPart(nn.Module):
    """Anything with adapter state. A subclass declares `slots`; the tensors then are attributes of those names."""

    starts_as_identity: ClassVar[bool] = True  # False: the adapted model differs from the base before any step
    file_prefix: ClassVar[str] = "base_model.model."

    module_name: str  # in the base; "" for what belongs to no module
    declared: Slots  # attribute -> slot

    def declare(self, module_name: str, slots: Mapping[str, Slot], *, meta: bool) -> None:
        """Register the declared tensors, unset: on the CPU (or the meta device), whatever device the base is on."""
        self.module_name, self.declared = module_name, dict(slots)
        for attribute, slot in slots.items():
            tensor = torch.empty(slot.shape, dtype=slot.dtype, device="meta" if meta else "cpu")
            if slot.kind == "trained":
                self.register_parameter(attribute, nn.Parameter(tensor))
            else:
                self.register_buffer(attribute, tensor, persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Fill every declared tensor; all randomness comes from `generator`, on the CPU, seeded by the module."""
        for attribute, slot in self.declared.items():
            tensor = getattr(self, attribute).data
            if slot.first is None:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
            else:
                tensor.fill_(slot.first)

    def name_of(self, slot: Slot) -> str:
        """The full name of a declared tensor."""
        return full_name(self.module_name, slot.suffix)

    def move(self, device: torch.device) -> None:
        """Bring the declared tensors, and nothing of the base, to `device`."""
        for attribute in self.declared:
            tensor = getattr(self, attribute)
            tensor.data = tensor.data.to(device)

    def state(self, kinds: Sequence[str] = KINDS) -> Tensors:
        """Held tensors of these kinds by full name, such as model.layers.0.mlp.up_proj.lora_A.weight."""
        return {
            self.name_of(slot): getattr(self, attribute)
            for attribute, slot in self.declared.items()
            if slot.kind in kinds
        }

    def exported(self) -> Tensors:
        """What the adapter's file holds, by full name."""
        return {name: tensor.detach() for name, tensor in self.state(("trained", "saved")).items()}

    def file_fields(self) -> PeftConfig:
        """Fields of PEFT's configuration that the state decides."""
        return {}

    def check_state(self) -> None:
        """Called whenever the state was filled from outside.

        Raises: AdapterError where values that are not trained, such as places, cannot be right.
        """

    @classmethod
    def file_key(cls, name: str) -> str:
        """The tensor's key in adapter_model.safetensors."""
        return cls.file_prefix + name

    def penalty(self) -> Tensor | None:
        """() float32 added to the step's loss, or None."""
        return None

    def after_backward(self) -> None:
        """Called once per optimizer step, between the last backward and clipping."""

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after the update of step `step` (0-based) of `total_steps`."""


def full_name(module_name: str, suffix: str) -> str:
    """Module name and tensor name joined."""
    return f"{module_name}.{suffix}" if module_name else suffix


class SharedPart(AdapterPart, Generic[Settings]):
    """A module made once and given to every layer of the adapter, saved once."""

    file_prefix = "base_model."

    def __init__(self, settings: Settings, targets: Sequence[Target], *, meta: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.declare("", self.slots(settings, targets), meta=meta)

    @classmethod
    def slots(cls, settings: Settings, targets: Sequence[Target]) -> Slots:
        """The state, from settings and targets alone."""
        raise NotImplementedError

    def take_layers(self, layers: Mapping[str, LayerAdapter[Any]]) -> None:
        """Called once, when every layer is made: a part that decides over all of them keeps them."""


class Wrapper(nn.Module):
    """Sits in the base's place of one module; whatever it does not know itself, it asks that module."""

    base_layer: Any

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
            return getattr(base, name)


class LayerAdapter(Wrapper, AdapterPart, Generic[Settings]):
    """One adapted layer: y = adapted(x), or base_layer(x) where the call bypasses adapters.

    A subclass gives `slots`; an additive one `update` and `delta`, any other `adapted` and `changed`.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})  # of model.weights.layer_kind

    def __init__(
        self,
        base: nn.Module,
        settings: Settings,
        target: Target,
        shared: SharedPart[Any] | None = None,
        *,
        meta: bool = False,
    ) -> None:
        super().__init__(base)
        self.settings, self.target = settings, target
        self.__dict__["shared"] = shared  # not a submodule: it belongs to all layers, and is saved once
        self.declare(target.name, self.slots(settings, target), meta=meta)

    @classmethod
    def slots(cls, settings: Settings, target: Target) -> Slots:
        """The state of one layer, from settings and shapes alone: an adapter file is checked against it unread."""
        raise NotImplementedError

    def initialise_from(self, generator: torch.Generator, evidence: object) -> None:
        """Fill it anew from what the recipe's initialisation has gathered of this layer, where a method has such."""
        raise NotImplementedError

    def base_weight(self) -> Weight:
        """The handle of the base's own matrix."""
        weight = weight_of(self.base_layer)
        assert weight is not None
        return weight

    def base_output(self, x: Tensor) -> Tensor:
        """What the base gives, (..., O)."""
        return self.base_layer(x)

    def dropped(self, x: Tensor) -> Tensor:
        """x with the settings' dropout, while training."""
        return F.dropout(x, getattr(self.settings, "dropout", 0.0), self.training)

    def update(self, x: Tensor) -> Tensor:
        """What an additive method adds to the base's output: x (..., I) -> (..., O)."""
        raise NotImplementedError

    def adapted(self, x: Tensor) -> Tensor:
        """The layer's output with the adapter: x (..., I) -> (..., O)."""
        y = self.base_output(x)
        return y + self.update(x).to(y.dtype)

    def delta(self) -> Tensor:
        """`update` as a change of the matrix, (O, I) float32.

        Raises: NotMergeable where there is no such matrix.
        """
        raise NotMergeable(f"{type(self).__name__} cannot be written into the weights of {self.target.name}")

    def changed(self, weight: Tensor) -> Tensor:
        """The matrix (O, I), float32, of the plain layer that computes the same, where the base's `weight` lies.

        Raises: NotMergeable.
        """
        return weight + self.delta().to(weight.device)

    @torch.no_grad()
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (O, I) and bias (O,), float32, of the plain layer that computes the same.

        Raises: NotMergeable.
        """
        return self.changed(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) if current_call().bypassed else self.adapted(x)


class ModelAdapter(AdapterPart, Generic[Settings]):
    """An adapter of the whole network, such as a prompt: it changes what goes in and what comes out.

    A subclass gives `slots` and `initialise`, and any of the other methods. Where the call bypasses adapters, none of
    `inputs` and `outputs` is used. `finished`: made from a folder, with nothing but what folders hold.
    """

    file_prefix = ""

    hooks: Sequence[RemovableHandle] = ()  # those that `attach` has put into the network

    def __init__(self, net: nn.Module, settings: Settings, *, meta: bool = False, finished: bool = False) -> None:
        super().__init__()
        self.settings, self.finished = settings, finished
        self.declare("", (self.file_slots if finished else self.slots)(settings, net), meta=meta)

    @classmethod
    def slots(cls, settings: Settings, net: nn.Module) -> Slots:
        """The state while training, from settings and the network's shapes."""
        raise NotImplementedError

    @classmethod
    def file_slots(cls, settings: Settings, net: nn.Module) -> Slots:
        """What the adapter's folder holds, where that is not the state itself but computed from it (by `exported`)."""
        return {attribute: slot for attribute, slot in cls.slots(settings, net).items() if slot.kind != "resume"}

    @classmethod
    def virtual_tokens(cls, settings: Settings) -> int:
        """Positions that stand before each row, of those that the network has."""
        return 0

    def taken_over(self, tensors: Tensors) -> Tensors:
        """The state to continue with, by name, made of that of the folder that init_from names."""
        return tensors

    @classmethod
    def may_differ(cls, settings: Settings) -> frozenset[str]:
        """Settings in which that folder may differ, since `taken_over` deals with them."""
        return frozenset()

    def attach(self, net: nn.Module) -> None:
        """Put in place whatever is needed inside the network; called before `initialise`."""

    def detach(self, net: nn.Module) -> None:
        """Take it out again."""
        for hook in self.hooks:
            hook.remove()

    def inputs(self, net: nn.Module, inputs: Tensors) -> Tensors:
        """What the network is called with (embeddings, mask, positions); in generation, for the first step only."""
        return inputs

    def outputs(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D), or logits, of the real positions."""
        return hidden


class Casts:
    """Factors in the compute dtype, made once for as long as no weight changes, else for every use."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside the block the trained weights do not change: what was cast is used again."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, or gave before under this key."""
        if self._kept is None:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def slot_count(slots: Iterable[Slot]) -> int:
    """Trained numbers in these slots."""
    return sum(math.prod(slot.shape) for slot in slots if slot.kind == "trained")
