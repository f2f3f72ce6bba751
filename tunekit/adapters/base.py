"""Base classes of all adapters: declared state, layer adapters, parts shared by layers, and whole-model adapters."""

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
KINDS = ("trained", "saved", "resume")  # saved: in the adapter's file but not trained; resume: only in checkpoints


class NotMergeable(InputError):
    """The adapter cannot be merged into the layer's weight and bias; the message says why."""


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter's state, declared before it is allocated.

    `suffix`: the tensor's name in PEFT's files, after the module's name. `rate`: "b" if LoRA+ multiplies its learning
    rate, "embedding" for the factors of an embedding. `decays`: whether weight decay applies. `first`: the initial
    value of all elements; None: random, as torch initialises the matrix of a linear layer.
    """

    suffix: str
    shape: tuple[int, ...]
    kind: str = "trained"
    decays: bool = True
    rate: str = ""
    dtype: torch.dtype = torch.float32
    first: float | None = 0.0


PeftConfig = dict[str, Any]  # fields of adapter_config.json
Slots = dict[str, Slot]  # attribute -> slot of the tensor with this attribute


class AdapterPart(nn.Module):
    """The base class of all parts of an adapter that have tensors. A subclass declares its tensors in `slots`, and has
    an attribute for each of them."""

    starts_as_identity: ClassVar[bool] = True  # False: the adapted model differs from the base before any step
    file_prefix: ClassVar[str] = "base_model.model."

    module_name: str  # in the base; "" for a part that belongs to no module
    declared: Slots  # attribute -> slot

    def declare(self, module_name: str, slots: Mapping[str, Slot], *, meta: bool) -> None:
        """Register the declared tensors without values, on the CPU or the meta device, independent of the base's
        device."""
        self.module_name, self.declared = module_name, dict(slots)
        for attribute, slot in slots.items():
            tensor = torch.empty(slot.shape, dtype=slot.dtype, device="meta" if meta else "cpu")
            if slot.kind == "trained":
                self.register_parameter(attribute, nn.Parameter(tensor))
            else:
                self.register_buffer(attribute, tensor, persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Initialise every declared tensor; all randomness comes from `generator`, on the CPU, seeded by the module."""
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
        """Move the declared tensors to `device`, but not the base."""
        for attribute in self.declared:
            tensor = getattr(self, attribute)
            tensor.data = tensor.data.to(device)

    def state(self, kinds: Sequence[str] = KINDS) -> Tensors:
        """The declared tensors of these kinds, by full names such as model.layers.0.mlp.up_proj.lora_A.weight."""
        return {
            self.name_of(slot): getattr(self, attribute)
            for attribute, slot in self.declared.items()
            if slot.kind in kinds
        }

    def file_tensors(self) -> Tensors:
        """The tensors of the adapter's file, by full name."""
        return {name: tensor.detach() for name, tensor in self.state(("trained", "saved")).items()}

    def file_fields(self) -> PeftConfig:
        """Fields of PEFT's configuration whose values depend on the adapter's tensors."""
        return {}

    def follow_state(self) -> None:
        """Called after the tensors were replaced, so that values computed from them follow."""

    def check_state(self) -> None:
        """Called after the tensors were loaded.

        Raises: AdapterError if tensors that are not trained, such as indices, are invalid.
        """

    @classmethod
    def file_key(cls, name: str) -> str:
        """The tensor's key in adapter_model.safetensors."""
        return cls.file_prefix + name

    def penalty(self) -> Tensor | None:
        """The penalty that is added to the step's loss, a float32 scalar tensor, or None."""
        return None

    def after_backward(self) -> None:
        """Called once per optimizer step, between the last backward and clipping."""

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after the update of step `step` (0-based) of `total_steps`."""


def full_name(module_name: str, suffix: str) -> str:
    """Module name and tensor name joined."""
    return f"{module_name}.{suffix}" if module_name else suffix


class SharedPart(AdapterPart, Generic[Settings]):
    """A part that all layers of the adapter share, and that is saved once."""

    file_prefix = "base_model."

    def __init__(self, settings: Settings, targets: Sequence[Target], *, meta: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.declare("", self.slots(settings, targets), meta=meta)

    @classmethod
    def slots(cls, settings: Settings, targets: Sequence[Target]) -> Slots:
        """Declares the shared tensors. They depend only on settings and targets."""
        raise NotImplementedError

    def take_layers(self, layers: Mapping[str, LayerAdapter[Any]]) -> None:
        """Called once after all layers are made. A subclass whose decisions concern all layers (AdaLoRA's rank
        budget) stores the layers here."""


class Wrapper(nn.Module):
    """Replaces one module of the base; unknown attributes are looked up in that module."""

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
    """One adapted layer: y = adapted(x), or base_layer(x) if the call bypasses adapters.

    A subclass defines `slots`. An additive adapter also defines `update` and `delta`; other adapters define `adapted`
    and `merged_weight`.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})  # a result of model.quantized.weights.layer_kind

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
        self.__dict__["shared"] = shared  # not a submodule: all layers share it, and it is saved once
        self.declare(target.name, self.slots(settings, target), meta=meta)

    @classmethod
    def slots(cls, settings: Settings, target: Target) -> Slots:
        """Declares the tensors of one layer. They depend only on settings and shapes, so a file can be checked before
        it is read."""
        raise NotImplementedError

    def initialise_from(self, generator: torch.Generator, evidence: object) -> None:
        """Initialise from the data that the initialisation method (`start` in the recipe) has collected about this
        layer."""
        raise NotImplementedError

    def continued_state(self, tensors: Tensors) -> Tensors:
        """This layer's initial tensors by name, if they are not those of the folder that the recipe's `init_from`
        names. Required if Method.regrows."""
        return {}

    def base_weight(self) -> Weight:
        """The object that reads the base's weight matrix."""
        weight = weight_of(self.base_layer)
        assert weight is not None
        return weight

    def base_output(self, x: Tensor) -> Tensor:
        """The base's output, (..., O)."""
        return self.base_layer(x)

    def apply_dropout(self, x: Tensor) -> Tensor:
        """Applies the dropout of the settings to x, in training mode only."""
        return F.dropout(x, getattr(self.settings, "dropout", 0.0), self.training)

    def update(self, x: Tensor) -> Tensor:
        """The term that an additive adapter adds to the base's output. Shapes: x (..., I) -> (..., O)."""
        raise NotImplementedError

    def adapted(self, x: Tensor) -> Tensor:
        """The layer's output with the adapter: x (..., I) -> (..., O)."""
        y = self.base_output(x)
        return y + self.update(x).to(y.dtype)

    @property
    def is_additive(self) -> bool:
        """Whether the layer's output is the base layer's output plus `update(x)`. Several such adapters can share one
        computation of the base layer's output."""
        return type(self).adapted is LayerAdapter.adapted

    @property
    def is_thin(self) -> bool:
        """Whether `update(x)` is B A x with the two thin factors that `thin_factors` returns."""
        return False

    def thin_factors(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R)."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """The change D (O, I) of the layer's matrix, float32: `update(x)` equals D x.

        Raises: NotMergeable if there is no such matrix.
        """
        what = f"{type(self).__name__} cannot be written into the weights of {self.target.name}"
        raise NotMergeable(what, "use the adapter without merging it")

    def low_rank(self, base_matrix: Callable[[], Tensor]) -> tuple[Tensor, Tensor] | None:
        """The whole change of the layer's matrix as two factors, A (R, I) and B (O, R), whose product is B A. For an
        embedding: A (R, V) and B (D, R). None if the method has no such form.

        `base_matrix`: reads the base's matrix (O, I) in float32, for a change that depends on this matrix.
        """
        return None

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The merged matrix (O, I) in float32: a layer without adapter that has this matrix computes the same as the
        adapted layer. The result is on the device of `weight`, the base's matrix.

        Raises: NotMergeable.
        """
        return weight + self.delta().to(weight.device)

    @torch.no_grad()
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The merged weight (O, I) and bias (O,) in float32: a layer without adapter that has both computes the same as
        the adapted layer.

        Raises: NotMergeable.
        """
        return self.merged_weight(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) if current_call().bypassed else self.adapted(x)


class ModelAdapter(AdapterPart, Generic[Settings]):
    """An adapter of the whole network, such as a prompt: it changes the network's inputs and outputs.

    A subclass defines `slots` and `initialise`, and any of the other methods. A forward that bypasses adapters does not
    call `inputs` and `outputs`. `from_folder`: the adapter is read from a folder, and has only the tensors that folders
    contain.
    """

    file_prefix = ""

    hooks: Sequence[RemovableHandle] = ()  # installed by `attach`

    def __init__(self, net: nn.Module, settings: Settings, *, meta: bool = False, from_folder: bool = False) -> None:
        super().__init__()
        self.settings, self.from_folder = settings, from_folder
        self.declare("", (self.file_slots if from_folder else self.slots)(settings, net), meta=meta)

    @classmethod
    def slots(cls, settings: Settings, net: nn.Module) -> Slots:
        """Declares the tensors that exist during training. They depend only on settings and the network's shapes."""
        raise NotImplementedError

    @classmethod
    def file_slots(cls, settings: Settings, net: nn.Module) -> Slots:
        """Declares the tensors of the adapter's folder. They differ from `slots` if `file_tensors` computes the
        folder's tensors."""
        return {attribute: slot for attribute, slot in cls.slots(settings, net).items() if slot.kind != "resume"}

    @classmethod
    def virtual_tokens(cls, settings: Settings) -> int:
        """The number of virtual tokens that the adapter puts before each row. They count towards the network's maximum
        length."""
        return 0

    def continued_state(self, tensors: Tensors) -> Tensors:
        """The initial tensors by name, computed from the tensors of the folder that the recipe's `init_from` names."""
        return tensors

    @classmethod
    def may_differ(cls, settings: Settings) -> frozenset[str]:
        """Names of settings whose values may differ between the recipe and the folder in `init_from`, because
        `continued_state` handles them."""
        return frozenset()

    def attach(self, net: nn.Module) -> None:
        """Install everything needed inside the network; called before `initialise`."""

    def detach(self, net: nn.Module) -> None:
        """Remove everything that `attach` installed."""
        for hook in self.hooks:
            hook.remove()

    def inputs(self, net: nn.Module, inputs: Tensors) -> Tensors:
        """The changed inputs of the network (embeddings, mask, positions). In generation only the first step is
        changed."""
        return inputs

    def outputs(self, hidden: Tensor) -> Tensor:
        """Removes the positions of virtual tokens from hidden states (B, T, D) or logits."""
        return hidden


class Casts:
    """A cache of factors that are cast to the compute dtype. It is valid as long as no weight changes."""

    def __init__(self) -> None:
        self._cache: dict[Hashable, Tensor] | None = None

    @contextmanager
    def caching(self) -> Iterator[None]:
        """A block in which no trained weight changes, so that casts are cached."""
        self._cache = {}
        try:
            yield
        finally:
            self._cache = None

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The cached value of this key. If there is none, the result of `make`."""
        if self._cache is None:
            return make()
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def slot_count(slots: Iterable[Slot]) -> int:
    """The number of trained values in these declared tensors."""
    return sum(math.prod(slot.shape) for slot in slots if slot.kind == "trained")
