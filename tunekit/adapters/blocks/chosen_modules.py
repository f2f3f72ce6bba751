"""Which of some modules a method's target_modules names, where the modules are no linear layers."""

from collections.abc import Sequence

from tunekit.adapters.module_names import named_copies
from tunekit.adapters.patterns import Patterns
from tunekit.errors import AdapterError


def chosen_names(names: Sequence[str], entries: str | Sequence[str], everything: str, what: str) -> list[str]:
    """All names where the entry is `everything`; else those that a list of endings, or an expression, matches.

    Raises: AdapterError where an entry matches nothing.
    """
    if entries == everything:
        found = {entries: list(names)}
    elif isinstance(entries, str):
        patterns = Patterns(key="target_modules")
        found = {entries: [name for name in names if patterns.matches(entries, name)]}
    else:
        found = {entry: named_copies(names, [entry]) for entry in entries}
    for entry, matching in found.items():
        if not matching:
            last = ", ".join(sorted({name.rpartition(".")[2] for name in names})[:12])
            how = f"the base's are {last}" if last else "this base has nothing of that kind; choose another method"
            raise AdapterError(f"'{entry}' matches no {what} of the base", how, key="adapter.target_modules")
    return sorted({name for matching in found.values() for name in matching})
