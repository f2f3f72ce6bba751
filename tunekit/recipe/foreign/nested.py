"""Configurations with sections of another tool, torchtune's or Unsloth's -> tunekit's keys.
What has no exact translation is a problem.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunekit.recipe.foreign.alias import Alias
from tunekit.recipe.foreign.become import UNTRANSLATED, complain, record, settle, write
from tunekit.recipe.reading.draft import Draft, Place


@dataclass
class Theirs:
    """Keys of another tool, `section.key`, with values and places; each is taken once."""

    draft: Draft
    values: dict[str, tuple[Any, Place]]
    places: dict[str, Place] = field(default_factory=dict)  # of those that were taken

    def get(self, name: str, default: object = None) -> Any:
        """The value; `default` where it is absent or empty."""
        value = self.values.get(name, (None, None))[0]
        return default if value is None else value

    def take(self, name: str, default: object = None) -> Any:
        """The value, which is dealt with now."""
        value, place = self.values.pop(name, (None, Place(self.draft.file)))
        self.places[name] = place
        return default if value is None else value

    def write(self, name: str, target: str, value: object) -> None:
        """Our key, for a key of theirs."""
        place = self.places.get(name) or self.values.get(name, (None, Place(self.draft.file)))[1]
        write(self.draft, tuple(target.split(".")), value, place, name)

    def record(self, name: str, what: str) -> None:
        """Say what became of a key that was taken."""
        record(self.draft, self.places[name], name, what)

    def complain(self, name: str, what: str, how: str = "") -> None:
        """Say that a key that was taken would be lost."""
        complain(self.draft, self.places[name], name, what, how)

    def settle(self, table: Mapping[str, Alias]) -> None:
        """Every key that is left, by the table; one that is not there would be lost."""
        for name in list(self.values):
            value = self.take(name)
            alias = table.get(name) or table.get(f"{name.partition('.')[0]}.*")
            if value is None or value == {}:
                self.record(name, "nothing (it is empty)")
            elif alias is None:
                self.complain(name, f"is a key of another tool and would be lost: {UNTRANSLATED}", "remove it")
            else:
                settle(self.draft, (name,), alias, value, self.places[name])


def take_all(draft: Draft) -> Theirs:
    """Every key of a draft with sections, out of it; a mapping in a section, or in a list, is one value."""
    taken: dict[str, tuple[Any, Place]] = {}
    for name, value in draft.values.items():
        if isinstance(value, dict):
            taken |= {f"{name}.{inner}": (value[inner], draft.place((name, inner))) for inner in value}
        else:
            taken[str(name)] = (value, draft.place((name,)))
    draft.values, draft.places = {}, {}
    return Theirs(draft, taken)
