"""Translates configurations with sections (torchtune's and Unsloth's). A key without an exact translation is a
problem.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunekit.recipe.foreign.alias import Alias
from tunekit.recipe.foreign.become import complain, record, settle, write
from tunekit.recipe.reading.draft import Draft, Place


@dataclass
class Theirs:
    """The untranslated keys of another tool's configuration, as `section.key`.

    `values`: value and place of each untranslated key; `places`: the places of the keys that `take` removed.
    """

    draft: Draft
    values: dict[str, tuple[Any, Place]]
    places: dict[str, Place] = field(default_factory=dict)

    def get(self, name: str, default: object = None) -> Any:
        """The value of a key; `default` if it is absent or empty."""
        value = self.values.get(name, (None, None))[0]
        return default if value is None else value

    def take(self, name: str, default: object = None) -> Any:
        """Remove a key and return its value; `default` if it is absent or empty."""
        value, place = self.values.pop(name, (None, Place(self.draft.file)))
        self.places[name] = place
        return default if value is None else value

    def write(self, name: str, target: str, value: object) -> None:
        """Write tunekit's key `target` for the other tool's key `name`."""
        place = self.places.get(name) or self.values.get(name, (None, Place(self.draft.file)))[1]
        write(self.draft, tuple(target.split(".")), value, place, name)

    def record(self, name: str, what: str) -> None:
        """Record the rewrite of a key that `take` removed. `what`: the key's new form, or `nothing` and the reason."""
        record(self.draft, self.places[name], name, what)

    def complain(self, name: str, what: str, how: str = "") -> None:
        """Add a problem of a key that `take` removed."""
        complain(self.draft, self.places[name], name, what, how)

    def settle(self, table: Mapping[str, Alias]) -> None:
        """Translate every remaining key as the table says. A key that is not in the table is a problem."""
        for name in list(self.values):
            value = self.take(name)
            alias = table.get(name) or table.get(f"{name.partition('.')[0]}.*")
            if value is None or value == {}:
                self.record(name, "nothing (it is empty)")
            elif alias is None:
                self.complain(name, "is not a known key, and would be lost", "correct its name, or remove it")
            else:
                settle(self.draft, (name,), alias, value, self.places[name])


def take_all(draft: Draft) -> Theirs:
    """Remove and return all keys of a draft with sections. A mapping inside a section or a list counts as one value."""
    taken: dict[str, tuple[Any, Place]] = {}
    for name, value in draft.values.items():
        if isinstance(value, dict):
            taken |= {f"{name}.{inner}": (value[inner], draft.place((name, inner))) for inner in value}
        else:
            taken[str(name)] = (value, draft.place((name,)))
    draft.values, draft.places = {}, {}
    return Theirs(draft, taken)
