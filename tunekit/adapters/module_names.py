"""The base's own modules and fused parameters by name, also with adapters in place, and how an entry names one.

Comes in: the base.  Goes out: names with their modules.  Next: targets.py, attach.py, folder.py.
"""

from __future__ import annotations

from torch import nn

from tunekit.adapters.base import Wrapper

OLD_EXPERT_NAMES = {"w1": "gate_up_proj", "w2": "down_proj", "w3": "gate_up_proj"}  # Mixtral's, before they were fused


def base_modules(net: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by name, whatever wraps them and without what adapters add; shared ones once."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        while isinstance(module, Wrapper):
            module = module.base_layer
        if id(module) in seen:
            return
        seen.add(id(module))
        found[name] = module
        for own, child in module.named_children():
            visit(f"{name}.{own}" if name else own, child)

    visit("", net)
    return found


def parameter_names(net: nn.Module) -> list[str]:
    """Names of the base's own parameters."""
    modules = base_modules(net)
    return [f"{name}.{own}" for name, module in modules.items() for own, _ in module.named_parameters(recurse=False)]


def fused_parameters(net: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """3-D parameters by name with their owners: the experts of a mixture, which are no layers of their own."""
    return {
        f"{name}.{own}": (module, parameter)
        for name, module in base_modules(net).items()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def endings(name: str) -> list[str]:
    """The name and what follows each of its dots: a.b.c, b.c, c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def is_fused_in(entry: str, parameter_name: str) -> bool:
    """gate_proj is in gate_up_proj: every piece of the entry's last name is a piece of the parameter's."""
    own = parameter_name.rpartition(".")[2]
    last = entry.rpartition(".")[2]
    last = OLD_EXPERT_NAMES.get(last, last)
    return bool(last) and set(last.split("_")) <= set(own.split("_"))
