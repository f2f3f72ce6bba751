"""Finds the modules and fused parameters of the base, even if adapters are attached, and matches the entries of
settings with their names."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tunekit.adapters.base import Wrapper, full_name
from tunekit.contracts import Modules
from tunekit.model.parts import OuterPart, modules_apart
from tunekit.recipe.bases.section import AdapterSettings

OLD_EXPERT_NAMES = {"w1": "gate_up_proj", "w2": "down_proj", "w3": "gate_up_proj"}  # Mixtral's names before fusion


def base_modules(net: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by name, without the wrappers and additions of adapters. A shared module occurs once."""
    modules: dict[str, nn.Module] = {}
    visited: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        while isinstance(module, Wrapper):
            module = module.base_layer
        if id(module) in visited or isinstance(module, OuterPart):
            return
        visited.add(id(module))
        modules[name] = module
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", net)
    return modules


def all_modules(net: nn.Module) -> Modules:
    """As base_modules, with the modules of parts that are not loaded. PEFT compares its entries with all of them."""
    return {**base_modules(net), **modules_apart(net)}


def parameter_names(modules: Modules) -> list[str]:
    """Names of the parameters of these modules."""
    return [
        full_name(name, parameter)
        for name, module in modules.items()
        for parameter, _ in module.named_parameters(recurse=False)
    ]


def fused_parameters(net: nn.Module, dimensions: tuple[int, ...] = (3,)) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """The base's 3-D parameters by name, each with the module that owns it. These are the experts of a mixture; the
    kernels of convolutions are excluded.

    `dimensions`: 2 includes matrices, such as the weights of layers and routers.
    """
    return {
        f"{name}.{parameter_name}": (module, parameter)
        for name, module in base_modules(net).items()
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in dimensions and not isinstance(module, _ConvNd)
    }


def endings(name: str) -> list[str]:
    """The name and its suffixes after each dot: a.b.c, b.c, c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def is_fused_in(entry: str, parameter_name: str) -> bool:
    """Whether the layer that the entry names is fused into this parameter: gate_proj is a part of gate_up_proj."""
    parameter_parts = parameter_name.rpartition(".")[2]
    entry_parts = entry.rpartition(".")[2]
    entry_parts = OLD_EXPERT_NAMES.get(entry_parts, entry_parts)
    return bool(entry_parts) and set(entry_parts.split("_")) <= set(parameter_parts.split("_"))


def named_copies(modules: Iterable[str], entries: Sequence[str]) -> list[str]:
    """Names of the modules to train as copies. Entries are full names or ends of names."""
    return sorted({name for name in modules for entry in entries if name and f".{name}".endswith(f".{entry}")})


def is_within(name: str, outer: Sequence[str]) -> bool:
    """Whether the module is one of `outer`, or inside one."""
    return any(name == other or name.startswith(f"{other}.") for other in outer)


def plain_entries(names: Sequence[str], modules: Modules) -> list[str] | None:
    """The shortest list for modules_to_save with which PEFT finds exactly `names`. PEFT compares the ends of names.
    None if there is no such list."""
    for entries in ({name.rpartition(".")[2] for name in names}, set(names)):
        if {name for name in modules if name and name.endswith(tuple(entries))} == set(names):
            return sorted(entries)
    return None


def layer_number(name: str, patterns: tuple[str, ...]) -> int | None:
    """The number of the module's layer: the first number in its name, or the number after one of `patterns`.

    model.layers.3.mlp.experts.0.w1 is in layer 3.
    """
    pieces = name.split(".")
    for before, piece in pairwise(pieces[:-1]):
        if piece.isascii() and piece.isdigit() and (not patterns or before in patterns):
            return int(piece)
    return None


def chosen_layers(settings: AdapterSettings) -> tuple[int, ...] | None:
    """The chosen layer numbers, or None for all layers."""
    wanted = getattr(settings, "layers_to_transform", None)
    return (wanted,) if isinstance(wanted, int) else wanted or None


def layer_patterns(settings: AdapterSettings) -> tuple[str, ...]:
    """The names of the lists that contain the numbered layers (layers_pattern). If empty, the first number in a
    module's name is its layer number."""
    patterns = getattr(settings, "layers_pattern", None)
    return (patterns,) if isinstance(patterns, str) else patterns or ()


def in_chosen_layers(names: Iterable[str], settings: AdapterSettings) -> set[str]:
    """The names of modules that are inside the chosen layers. Modules outside of numbered layers are left out."""
    wanted, patterns = chosen_layers(settings), layer_patterns(settings)
    return {name for name in names if wanted is None or layer_number(name, patterns) in wanted}


def check_layer_numbers(names: Iterable[str], settings: AdapterSettings) -> tuple[list[int], list[int]]:
    """Two lists: the chosen layer numbers that the base does not have, and all layer numbers that the base has."""
    existing = {
        number for name in names for number in [layer_number(name, layer_patterns(settings))] if number is not None
    }
    return sorted(set(chosen_layers(settings) or ()) - existing), sorted(existing)
