"""Checks that PEFT applies every tensor of a saved adapter, by PEFT's rule for names, in the class of config.json."""

from pathlib import Path

from torch import nn

from tunekit.adapters.folder.config import adapter_header, read_fields, tensors_path
from tunekit.adapters.folder.expected import PREFIX
from tunekit.adapters.module_names import all_modules, endings
from tunekit.adapters.patterns import Patterns
from tunekit.errors import AdapterError, listed


def check_applied(net: nn.Module, folder: Path) -> None:
    """Check that the modules that PEFT would adapt are those with tensors in the folder, and that no tensor belongs
    to a module that the net lacks.

    Raises: AdapterError.
    """
    entries, patterns = read_fields(folder).get("target_modules") or (), Patterns()
    keys = [key.removeprefix(PREFIX) for key in adapter_header(tensors_path(folder)) if key.startswith(PREFIX)]
    modules = [name for name in all_modules(net) if name]
    if isinstance(entries, str):
        adapted = [name for name in modules if patterns.matches(entries, name)]
    else:
        adapted = [name for name in modules if not set(endings(name)).isdisjoint(entries)]
    wrong = [name for name in adapted if not any(key.startswith(f"{name}.") for key in keys)]
    wrong += [key for key in keys if set(_possible_modules(key)).isdisjoint(modules)]
    if wrong:
        what = f"PEFT would not apply this adapter as it was trained: {listed(wrong, 3)}"
        raise AdapterError(what, "report this fault of tunekit", file=str(folder))


def _possible_modules(key: str) -> list[str]:
    """The modules to which a tensor can belong: its name without one to three parts, such as lora_A.weight."""
    parts = key.split(".")
    return [".".join(parts[:-count]) for count in range(1, min(4, len(parts)))]
