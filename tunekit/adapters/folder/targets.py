"""Writes an adapter's targets into PEFT's configuration, as sorted entries with which PEFT finds exactly these
layers."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tunekit.adapters.folder.fields import json_value
from tunekit.adapters.patterns import Patterns
from tunekit.records import JsonObject


def concrete_targets(
    names: Collection[str], all_names: Collection[str], depths: Sequence[int] = (1,)
) -> list[str] | str:
    """The shortest sorted list of entries with which PEFT finds exactly the layers `names`. The entries are the last
    parts of the names (q_proj) or, if these match other layers too, full names. If full names also match other layers,
    a regular expression is returned.

    `depths`: the numbers of last parts to try for short entries.
    """
    wanted = set(names)
    shortened = [{".".join(name.split(".")[-depth:]) for name in names} for depth in depths]
    for entries in (*shortened, wanted):
        ends = tuple(f".{entry}" for entry in entries)
        if {name for name in all_names if name in entries or name.endswith(ends)} == wanted:
            return sorted(entries)
    return "|".join(re.escape(name) for name in sorted(names))


def entries_for(names: Collection[str], all_names: Collection[str], entries: list[str] | str) -> list[str] | str:
    """The entries from `entries` with which PEFT finds exactly the layers `names`, for fields where PEFT compares the
    ends of names. If no such entries exist, a regular expression is returned."""
    if isinstance(entries, list):
        chosen = tuple(entry for entry in entries if any(name.endswith(entry) for name in names))
        if {name for name in all_names if name.endswith(chosen)} == set(names):
            return sorted(chosen)
    return "|".join(re.escape(name) for name in sorted(names))


def concrete_pattern(pattern: Mapping[str, Any], resolved: Mapping[str, Any], default: object) -> JsonObject:
    """A rank or alpha pattern with which PEFT gives each layer its value in `resolved`, independent of the order of the
    keys.

    PEFT takes the first key that matches, and may sort the keys when it saves. The recipe's keys are written unless two
    keys with different values match one layer. In that case, every layer whose value is not the default gets its own
    anchored and escaped key.
    """
    patterns = Patterns()
    for name, value in resolved.items():
        values = {pattern[key] for key in pattern if patterns.matches_ending(key, name)} or {default}
        if values != {value}:
            break
    else:
        return {key: json_value(pattern[key]) for key in sorted(pattern)}
    return {f"^{re.escape(name)}": json_value(value) for name, value in sorted(resolved.items()) if value != default}
