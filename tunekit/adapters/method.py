"""The class Method with the facts that other folders read about a method, and functions that find methods by name."""

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
    """A setting that does not fit the layers: the recipe key, the fault, and the remedy."""

    key: str
    what: str
    how: str


def saved_modules(settings: AdapterSettings) -> Sequence[str]:
    """Names of the modules that are fully trained."""
    names: Sequence[str] = getattr(settings, "modules_to_save", ())
    return () if getattr(settings, "trains_base", False) else names


def needs_reference_state(objective: Objective, settings: AdapterSettings, *, exported: bool = False) -> bool:
    """Whether the loss compares with a policy at step 0 that differs from the base with the adapter bypassed.

    `exported`: whether it differs from the base with the exported folder bypassed; there the base again has the
    weights that an initialisation took from it.
    """
    method, start = load_method(settings.method), settings.initialisation
    part = method.layer or method.model or LayerAdapter
    changed = start is not None and (start.looks_at == "original" or (start.moves_weights and not exported))
    starts_as_base = part.starts_as_identity and settings.init_from is None and not changed
    return objective.loss.reference and not starts_as_base


def always_linear(settings: AdapterSettings) -> bool:
    """Method.is_linear of a method whose update is always linear in its tensors."""
    return True


@dataclass(frozen=True)
class Method:
    """The METHOD of a method's file: its classes, and facts for other folders.

    `layer`, `parameter`, `model`: its classes for layers, for fused 3-D parameters, for the whole network.
    `only_copies`: for a method that only copies modules: the base's modules, settings -> the copied parameters.
    `copy`: the class of these copies, and of modules that are fully trained next to other methods.
    `tensors`: names of its tensors in PEFT's files after the module's name, as far as other folders need them.
    `is_linear`: settings -> whether its update is linear in its tensors, so that sums of adapters are adapters;
    `neutral`: the value of a trained tensor that changes nothing.
    `unbinding`: its settings that may differ in a folder without changing the computation.
    `conflicts`: settings, targets, whether the settings are a file's; `run_conflicts`: settings, optimizer steps.
    `with_tokenizer`: returns the settings with their texts as token ids.
    `read_as`: the method that reads its folder, if the two differ only in training.
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
    conflicts: Callable[[Any, Sequence[Target], bool], Sequence[Conflict]] = lambda settings, targets, file: ()
    run_conflicts: Callable[[Any, int], Sequence[Conflict]] = lambda settings, steps: ()
    with_tokenizer: Callable[[Any, Tokenizer], Any] = lambda settings, tokenizer: settings
    read_as: str | None = None
    in_diffusers_file: bool = False

    def groups(self, net: nn.Module, settings: AdapterSettings, targets: Sequence[Target]) -> list[LayerGroup]:
        """The groups of layers that will be computed together on this base; empty without a kernel."""
        modules = dict(net.named_modules(remove_duplicate=False))
        return [] if self.kernel is None else self.kernel.groups(net, modules, settings, targets)

    def copied_modules(self, modules: Modules, settings: AdapterSettings, targets: Sequence[Target]) -> Copies:
        """All modules to copy. With bias: all, these include every owner of a bias that is not an adapted layer."""
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
        """The class of this module's copy: `copy`, except for modules that are fully trained next to a method of
        copies."""
        fully_trained = self.only_copies is not None and bool(named_copies([name], saved_modules(settings)))
        return TrainedCopy if fully_trained else self.copy


def load_method(name: str) -> Method:
    """METHOD of adapters/methods/NAME.py; the recipe's reader has checked the name."""
    return import_module(f"tunekit.adapters.methods.{name}").METHOD


def all_methods() -> list[Method]:
    """METHOD of every file."""
    return [load_method(name) for name in known_names("adapters")]
