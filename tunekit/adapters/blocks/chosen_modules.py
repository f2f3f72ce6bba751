"""Selects modules by the setting `target_modules`, for methods that adapt modules other than linear layers."""

from collections.abc import Sequence

from tunekit.adapters.module_names import named_copies
from tunekit.adapters.patterns import Patterns
from tunekit.errors import AdapterError


def chosen_names(names: Sequence[str], entries: str | Sequence[str], everything: str, what: str) -> list[str]:
    """The names that `entries` selects: names with one of the listed endings, or names that match a regular expression.
    The entry `everything` selects all names.

    Raises: AdapterError if an entry matches nothing.
    """
    if entries == everything:
        matches = {entries: list(names)}
    elif isinstance(entries, str):
        patterns = Patterns(key="target_modules")
        matches = {entries: [name for name in names if patterns.matches(entries, name)]}
    else:
        matches = {entry: named_copies(names, [entry]) for entry in entries}
    for entry, matching in matches.items():
        if not matching:
            last = ", ".join(sorted({name.rpartition(".")[2] for name in names})[:12])
            how = f"the base has: {last}" if last else "this base has no such module; choose another method"
            raise AdapterError(f"'{entry}' matches no {what} of the base", how, key="adapter.target_modules")
    return sorted({name for matching in matches.values() for name in matching})
