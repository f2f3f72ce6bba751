"""The targets of an adapter as PEFT's configuration states them: concrete, sorted, and meaning exactly these layers.

Module names of the base and resolved targets go in; target_modules, rank_pattern and alpha_pattern come out.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tunekit.adapters.folder.fields import plain
from tunekit.adapters.patterns import Patterns
from tunekit.records import JsonObject


def concrete_targets(
    names: Collection[str], all_names: Collection[str], depths: Sequence[int] = (1,)
) -> list[str] | str:
    """The shortest sorted list that PEFT reads as exactly `names`: last names, else whole names, else an expression.

    `depths`: of how many of its last pieces a shortened name may be made.
    """
    wanted = set(names)
    shortened = [{".".join(name.split(".")[-depth:]) for name in names} for depth in depths]
    for entries in (*shortened, wanted):
        ends = tuple(f".{entry}" for entry in entries)
        if {name for name in all_names if name in entries or name.endswith(ends)} == wanted:
            return sorted(entries)
    return "|".join(re.escape(name) for name in sorted(names))


def entries_for(names: Collection[str], all_names: Collection[str], entries: list[str] | str) -> list[str] | str:
    """Those of the target entries that mean exactly `names` where PEFT compares plain endings; else an expression."""
    if isinstance(entries, list):
        chosen = tuple(entry for entry in entries if any(name.endswith(entry) for name in names))
        if {name for name in all_names if name.endswith(chosen)} == set(names):
            return sorted(chosen)
    return "|".join(re.escape(name) for name in sorted(names))


def concrete_pattern(pattern: Mapping[str, Any], resolved: Mapping[str, Any], default: object) -> JsonObject:
    """A pattern from which PEFT reads `resolved` (layer -> value), whatever the order of its keys.

    PEFT takes the first key that matches, and may sort them when it saves. The recipe's own keys stay where no layer is
    matched by two that differ; else every layer off the default gets a key of its own, anchored and escaped.
    """
    patterns = Patterns()
    for name, value in resolved.items():
        found = {pattern[key] for key in pattern if patterns.matches_ending(key, name)} or {default}
        if found != {value}:
            break
    else:
        return {key: plain(pattern[key]) for key in sorted(pattern)}
    return {f"^{re.escape(name)}": plain(value) for name, value in sorted(resolved.items()) if value != default}
