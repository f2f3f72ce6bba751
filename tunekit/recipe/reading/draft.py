"""A recipe while it is being read: its plain values, and the place of every written key."""

from dataclasses import dataclass, field
from typing import Any

from tunekit.errors import Problem

COMMAND_LINE = "command line"
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """The place where a key is written. `spelled`: the key as the user wrote it, if it is another tool's name."""

    file: str
    line: int | None = None
    spelled: str | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass
class Draft:
    """The recipe's values (dicts, lists, scalars) with their places, and the problems and rewrites found so far."""

    file: str
    values: Any = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    rewrites: list[str] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)  # sentences about defaults that depend on other keys
    program: str | None = None  # the training command, if the keys are its options
    # keys that could not be translated, so they are not reported as missing
    untranslated: set[KeyPath] = field(default_factory=set)

    def has(self, key: KeyPath) -> bool:
        """Whether the key is written. A key that is written as null counts."""
        return key in self.places

    def get(self, key: KeyPath, default: object = None) -> Any:
        """The value of a key, or `default` if the key is not written."""
        value = self.values
        for part in key:
            if not has_item(value, part):
                return default
            value = value[part]
        return value

    def place(self, key: KeyPath) -> Place:
        """The place of a key. If it is not written, the place of the nearest written mapping or list around it."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return Place(self.file)

    def set(self, key: KeyPath, value: object, place: Place) -> None:
        """Write a value. Its inner keys get the same place; missing mappings around the key are created."""
        self.forget(key)
        holder = self.values
        for length, part in enumerate(key[:-1], 1):
            holder = holder.setdefault(part, {}) if isinstance(holder, dict) else holder[part]
            self.places.setdefault(key[:length], place)
        last = key[-1]
        if isinstance(holder, list) and last == len(holder):
            holder.append(value)
        else:
            holder[last] = value
        self._mark(key, value, place)

    def remove(self, key: KeyPath) -> Any:
        """Remove a written key and return its value."""
        holder = self.get(key[:-1])
        value = holder.pop(key[-1])
        self._unmark(key, value)
        if isinstance(holder, list):
            self._close_gap(key)
        return value

    def forget(self, key: KeyPath) -> None:
        """Forget the places of a key and of all keys inside it."""
        self._unmark(key, self.get(key))

    def wrap(self, key: KeyPath, inner: str | int) -> None:
        """Move a value and its places one level down: x becomes {inner: x}, or [x] if `inner` is a number."""
        value, place = self.get(key), self.place(key)
        moved = {(*key, inner, *known[len(key) :]): at for known, at in self.places.items() if known[: len(key)] == key}
        self.set(key, {inner: value} if isinstance(inner, str) else [value], place)
        self.places.update(moved)

    def add_problem(self, key: KeyPath, what: str, how: str = "") -> None:
        """Record a problem with a key. `what`: what is wrong; `how`: how to mend it."""
        self.problems.append(self.problem(key, what, how))

    def problem(self, key: KeyPath, what: str, how: str = "") -> Problem:
        """A problem with a key. It contains the key's place and the user's spelling of the key."""
        place = self.place(key)
        name = dotted(key)
        if place.spelled and place.spelled != name:
            name = f"{name} (written {place.spelled})"
        return Problem(what, how, file=place.file, line=place.line, key=name or None)

    def lines(self) -> dict[str, int]:
        """Dotted key -> line number, for keys that are written in the file."""
        return {dotted(key): place.line for key, place in self.places.items() if place.line is not None}

    def written_in(self, file: str) -> frozenset[str]:
        """Dotted keys that were written in this file (or on the command line)."""
        return frozenset(dotted(key) for key, place in self.places.items() if place.file == file)

    def _mark(self, key: KeyPath, value: object, place: Place) -> None:
        self.places[key] = place
        for part, inner in inner_items(value):
            self._mark((*key, part), inner, place)

    def _unmark(self, key: KeyPath, value: object) -> None:
        self.places.pop(key, None)
        for part, inner in inner_items(value):
            self._unmark((*key, part), inner)

    def _close_gap(self, key: KeyPath) -> None:
        """Correct the places of a list's later items after the item `key` was removed: their index decreases by one."""
        *prefix, removed = key
        depth = len(prefix)
        places, self.places = self.places, {}
        for known, place in places.items():
            inside = len(known) > depth and known[:depth] == tuple(prefix)
            if inside and int(known[depth]) > int(removed):
                known = (*prefix, int(known[depth]) - 1, *known[depth + 1 :])
            self.places[known] = place


def has_item(value: object, part: str | int) -> bool:
    """Whether a mapping has this key, or a list has this index."""
    if isinstance(value, list):
        return isinstance(part, int) and 0 <= part < len(value)
    return isinstance(value, dict) and part in value


def inner_items(value: object) -> list[tuple[str | int, Any]]:
    """The (key or index, value) pairs of a mapping or list; a scalar has no pairs."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def dotted(key: KeyPath) -> str:
    """("data", "train", 0, "path") -> data.train.0.path"""
    return ".".join(str(part) for part in key)
