"""Which modules, beside the adapted layers, are trained as copies: those that are named, and owners of biases.

Comes in: the base, settings, targets.  Goes out: module name -> its parameters to train (None: all).
Next: attach.py, expected.py, targets.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tunekit.adapters.base import Method
from tunekit.records import Target

Copies = dict[str, tuple[str, ...] | None]


def named_copies(modules: Mapping[str, nn.Module], entries: Sequence[str]) -> list[str]:
    """Names of the modules that the entries (whole names or endings) ask to train as copies."""
    names = {name for name in modules for entry in entries if name and (name == entry or name.endswith(f".{entry}"))}
    return sorted(names)


def wrong_entries(modules: Mapping[str, nn.Module], entries: Sequence[str], in_file: bool) -> list[tuple[str, str]]:
    """What is wrong, and how to mend it. PEFT's own files name heads on suspicion: there an entry may match nothing."""
    wrong = []
    for entry in entries:
        if not named_copies(modules, [entry]) and not in_file:
            last = sorted({name.rpartition(".")[2] for name in modules})
            near = difflib.get_close_matches(entry.rpartition(".")[2], last, n=3, cutoff=0.5)
            how = f"did you mean {' or '.join(map(repr, near))}?" if near else "name a module of the base"
            wrong.append((f"'{entry}' matches no module of the base", how))
    copies = named_copies(modules, entries)
    if copies and plain_entries(copies, modules) is None:
        wrong.append((f"{', '.join(entries)} cannot be told from other modules in PEFT's format", "leave them out"))
    return wrong


def is_within(name: str, outer: Sequence[str]) -> bool:
    """Whether the module is one of `outer`, or inside one."""
    return any(name == other or name.startswith(f"{other}.") for other in outer)


def copied_places(modules: Mapping[str, nn.Module], method: Method, settings: Any, targets: Sequence[Target]) -> Copies:
    """Every module to copy. With bias: all these are also all owners of a bias that is not an adapted layer's."""
    whole = named_copies(modules, method.copies(settings))
    places: Copies = dict.fromkeys(whole)
    if getattr(settings, "bias", "none") == "all":
        adapted = {target.name for target in targets}
        for name, module in modules.items():
            owns = any(own == "bias" for own, _ in module.named_parameters(recurse=False))
            if owns and name not in adapted and not is_within(name, whole):
                places[name] = ("bias",)
    places |= method.places(modules, settings) if method.places else {}
    return dict(sorted(places.items()))


def plain_entries(names: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str] | None:
    """The shortest list that PEFT reads as exactly `names` in modules_to_save, where it compares plain endings."""
    for entries in ({name.rpartition(".")[2] for name in names}, set(names)):
        if {name for name in modules if name and name.endswith(tuple(entries))} == set(names):
            return sorted(entries)
    return None
