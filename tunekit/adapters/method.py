"""What a method is: its METHOD, the facts that other rooms ask of it, and how one is found by name."""

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

WrittenForm = tuple[AdapterSettings, list[Target], dict[str, LayerAdapter[Any]]]  # layers as the folder holds them
Copies = dict[str, tuple[str, ...] | None]  # module name -> its parameters that are copied; None: all of them


@dataclass(frozen=True)
class Conflict:
    """A setting that does not fit the layers: the recipe key, what is wrong, how to mend it."""

    key: str
    what: str
    how: str


def saved_modules(settings: AdapterSettings) -> Sequence[str]:
    """Names of the modules that are trained whole."""
    names: Sequence[str] = getattr(settings, "modules_to_save", ())
    return () if getattr(settings, "trains_base", False) else names


def needs_reference_state(objective: Objective, settings: AdapterSettings, *, exported: bool = False) -> bool:
    """Whether the loss compares with a policy at step 0 that is not the base with the adapter bypassed; `exported`:
    with its exported folder bypassed, where the base has the weights that an initialisation took from it."""
    method, start = load_method(settings.method), settings.initialisation
    part = method.layer or method.model or LayerAdapter
    changed = start is not None and (start.looks_at == "original" or (start.moves_weights and not exported))
    starts_as_base = part.starts_as_identity and settings.init_from is None and not changed
    return objective.loss.reference and not starts_as_base


def always(settings: AdapterSettings) -> bool:
    """Method.is_linear of a method whose update is always linear in its tensors."""
    return True


@dataclass(frozen=True)
class Method:
    """What a method's file declares as METHOD: the classes it is made of, and what other rooms ask of it.

    `layer`, `parameter`, `model`: its classes for layers, for fused 3-D parameters, for the whole network.
    `only_copies`: of a method that is nothing but copies: the base's modules, settings -> what is copied.
    `copy`: the class of these copies, and of modules trained whole beside other methods.
    `tensors`: names of its tensors in PEFT's files after the module's name, as far as other rooms must know them.
    `is_linear`: settings -> whether its update is linear in its tensors, so that sums of adapters are adapters;
    `neutral`: the value of a trained tensor that changes nothing.
    `unbinding`: settings of its own that a folder may have otherwise and compute the same.
    `conflicts`: settings, targets, whether the settings are a file's; `run_conflicts`: settings, optimizer steps.
    `with_tokenizer`: gives the settings with their texts as token ids.
    `read_as`: the method as which its folder is read, where the two differ only in training.
    `in_diffusers_file`: whether the folder of a pipeline's adapter holds diffusers' file in place of PEFT's.
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
        """The groups of layers that attaching to this base will compute together; none without a kernel."""
        modules = dict(net.named_modules(remove_duplicate=False))
        return [] if self.kernel is None else self.kernel.groups(net, modules, settings, targets)

    def copied_modules(self, modules: Modules, settings: AdapterSettings, targets: Sequence[Target]) -> Copies:
        """Every module to copy. With bias: all these are also all owners of a bias that is not an adapted layer's."""
        whole = named_copies(modules, saved_modules(settings))
        copied: Copies = dict.fromkeys(whole)
        if getattr(settings, "bias", "none") == "all":
            adapted = {target.name for target in targets}
            for name, module in modules.items():
                owns = any(own == "bias" for own, _ in module.named_parameters(recurse=False))
                if owns and name not in adapted and not is_within(name, whole):
                    copied[name] = ("bias",)
        copied |= self.only_copies(modules, settings) if self.only_copies else {}
        return dict(sorted(copied.items()))

    def copy_class(self, settings: AdapterSettings, name: str) -> type[TrainedCopy]:
        """The class of this module's copy: `copy`, but for what is trained whole beside a method of copies."""
        whole = self.only_copies is not None and bool(named_copies([name], saved_modules(settings)))
        return TrainedCopy if whole else self.copy


def load_method(name: str) -> Method:
    """METHOD of adapters/methods/NAME.py; the recipe has checked that the name is one of ours."""
    return import_module(f"tunekit.adapters.methods.{name}").METHOD


def all_methods() -> list[Method]:
    """METHOD of every file."""
    return [load_method(name) for name in known_names("adapters")]
