"""Defines the class Method, which describes a method of adaptation to the rest of the program, and functions that find
a method by its name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from tunekit.adapters.base import LayerAdapter, ModelAdapter, SharedPart
from tunekit.adapters.copies import TrainedCopy
from tunekit.adapters.expert_parameters import ParameterAdapter
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.kernels.joined_lora import JoinedProducts, LayerGroup
from tunekit.adapters.module_names import is_within, named_copies
from tunekit.contracts import Modules, Objective, Tokenizer
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.reading.names import known_names
from tunekit.records import Target

WrittenForm = tuple[AdapterSettings, list[Target], dict[str, LayerAdapter[Any]]]  # layers as in the folder
Copies = dict[str, tuple[str, ...] | None]  # module name -> its copied parameters; None: all of them


@dataclass(frozen=True)
class Conflict:
    """A setting that does not fit the adapted layers: its key in the recipe, the problem, and the advice."""

    key: str
    what: str
    how: str


def saved_modules(settings: AdapterSettings) -> Sequence[str]:
    """Names of the modules that are fully trained."""
    names: Sequence[str] = getattr(settings, "modules_to_save", ())
    return () if getattr(settings, "trains_base", False) else names


def needs_reference_state(objective: Objective, settings: AdapterSettings, *, exported: bool = False) -> bool:
    """Whether training must keep a copy of the policy at step 0. That is the case if the loss compares with this
    policy, and the policy is not simply the base with the adapter bypassed. `exported`: see `starts_as_base`."""
    return objective.loss.reference and (settings.trains_base or not starts_as_base(settings, exported=exported))


def starts_as_base(settings: AdapterSettings, *, exported: bool = False) -> bool:
    """Whether the policy at step 0 is the base with the adapter bypassed.

    `exported`: answer for the exported folder. There the base again has the weights that an initialisation such as
    PiSSA moved into the adapter.
    """
    method, start = load_method(settings.method), settings.initialisation
    part = method.layer or method.model or LayerAdapter
    changed = start is not None and (start.looks_at == "original" or (start.moves_weights and not exported))
    return part.starts_as_identity and settings.init_from is None and not changed


def always_linear(settings: AdapterSettings) -> bool:
    """Returns True. It is Method.is_linear for methods whose update is linear in the tensors with any settings."""
    return True


@dataclass(frozen=True)
class Method:
    """A method of adaptation: its classes and its properties. Each file in adapters/methods defines one as METHOD.

    `layer`, `parameter`, `model`: the classes for layers, for fused 3-D parameters, and for the whole network.
    `only_copies`: for methods that only train copies of modules: (the base's modules, settings) -> copied parameters.
    `copy`: the class of these copies, and of the modules that other methods train fully (modules_to_save).
    `tensors`: the tensor names that follow the module's name in PEFT's files, if code outside of adapters needs them.
    `is_linear`: whether, with these settings, the update is linear in the tensors, so that adapters can be added.
    `neutral`: the value of the trained tensors with which the adapter changes nothing.
    `unbinding`: settings that do not change the computation. The recipe may change them when it continues from a
    folder. `conflicts`: (settings, targets, whether the settings come from a file) -> conflicts.
    `regrows`: whether the layers of a continued folder may have lower ranks than in the recipe, because training
    removes ranks. `run_conflicts`: (settings, number of optimizer steps) -> conflicts.
    `with_tokenizer`: (settings, tokenizer) -> the settings with their texts as token ids.
    `read_as`: the name of another method that differs only in training; folders are read as folders of that method.
    `in_diffusers_file`: whether a pipeline's adapter is saved in diffusers' file instead of PEFT's.
    """

    peft: PeftSide[Any]
    layer: type[LayerAdapter[Any]] | None = None
    shared: type[SharedPart[Any]] | None = None
    repeats_shared: bool = False  # PEFT's files repeat the shared tensors under each layer
    parameter: type[ParameterAdapter[Any]] | None = None
    model: type[ModelAdapter[Any]] | None = None
    only_copies: Callable[[Modules, Any], Mapping[str, tuple[str, ...] | None]] | None = None
    copy: type[TrainedCopy] = TrainedCopy
    kernel: JoinedProducts | None = None
    written_form: Callable[[WrittenForm], WrittenForm] = lambda form: form
    tensors: tuple[str, ...] = ()
    is_linear: Callable[[Any], bool] = lambda settings: False
    neutral: float = 0.0
    unbinding: frozenset[str] = frozenset()
    regrows: bool = False
    conflicts: Callable[[Any, Sequence[Target], bool], Sequence[Conflict]] = lambda settings, targets, file: ()
    run_conflicts: Callable[[Any, int], Sequence[Conflict]] = lambda settings, steps: ()
    with_tokenizer: Callable[[Any, Tokenizer], Any] = lambda settings, tokenizer: settings
    read_as: str | None = None
    in_diffusers_file: bool = False

    def groups(self, net: nn.Module, settings: AdapterSettings, targets: Sequence[Target]) -> list[LayerGroup]:
        """The groups of layers that will be computed together on this base. Empty if the method has no joined
        computation."""
        modules = dict(net.named_modules(remove_duplicate=False))
        return [] if self.kernel is None else self.kernel.groups(net, modules, settings, targets)

    def copied_modules(self, modules: Modules, settings: AdapterSettings, targets: Sequence[Target]) -> Copies:
        """All modules whose parameters are trained as copies. With `bias: all`, the biases of all modules that are not
        adapted are included."""
        fully_trained = named_copies(modules, saved_modules(settings))
        copied: Copies = dict.fromkeys(fully_trained)
        if getattr(settings, "bias", "none") == "all":
            adapted = {target.name for target in targets}
            for name, module in modules.items():
                has_bias = any(parameter_name == "bias" for parameter_name, _ in module.named_parameters(recurse=False))
                if has_bias and name not in adapted and not is_within(name, fully_trained):
                    copied[name] = ("bias",)
        copied |= self.only_copies(modules, settings) if self.only_copies else {}
        return dict(sorted(copied.items()))

    def copy_class(self, settings: AdapterSettings, name: str) -> type[TrainedCopy]:
        """The class of this module's copy: the method's `copy`. If the method itself only copies modules, modules of
        `modules_to_save` get the base class TrainedCopy."""
        fully_trained = self.only_copies is not None and bool(named_copies([name], saved_modules(settings)))
        return TrainedCopy if fully_trained else self.copy


def load_method(name: str) -> Method:
    """The METHOD of adapters/methods/NAME.py. The recipe's reader has already checked the name."""
    return import_module(f"tunekit.adapters.methods.{name}").METHOD


def all_methods() -> list[Method]:
    """The METHOD of every file in adapters/methods."""
    return [load_method(name) for name in known_names("adapters")]
