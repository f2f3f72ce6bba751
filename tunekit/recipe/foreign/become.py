"""Rewrites one key of another tool: to tunekit's key, to nothing if the key has no effect, or to a problem."""

from typing import Any

from tunekit.errors import Problem
from tunekit.recipe.foreign.alias import Alias
from tunekit.recipe.foreign.values import NOTHING, NotExact
from tunekit.recipe.reading.draft import Draft, KeyPath, Place, dotted
from tunekit.recipe.reading.suggest import show

UNLIMITED = 1 << 17  # data.max_length for tools without a limit


def rewrite(draft: Draft, key: KeyPath, alias: Alias) -> None:
    """Rewrite one key of another tool as its table entry says. An empty value has no effect, as in the other tools."""
    place, value = draft.place(key), draft.get(key)
    inner = [draft.place((*key, index)) for index in range(len(value) if isinstance(value, list) else 0)]
    draft.remove(key)
    if value is None:
        record(draft, place, dotted(key), "nothing (it is empty)")
    elif (target := settle(draft, key, alias, value, place)) is not None:
        for index, at in enumerate(inner):  # the items of a translated list keep their own lines
            for known in [known for known in draft.places if known[: len(target) + 1] == (*target, index)]:
                draft.places[known] = Place(at.file, at.line, draft.places[known].spelled)


def settle(draft: Draft, key: KeyPath, alias: Alias, value: object, place: Place) -> KeyPath | None:
    """Translate the value of a key that was removed from the draft, and write it under tunekit's key. Returns this key,
    or None if nothing was written."""
    spelled = dotted(key)
    try:
        ours = alias.translate(value)
    except NotExact as lost:
        complain(draft, place, spelled, lost.what, lost.how)
        draft.untranslated.add(alias.target or key)
        return None
    if ours is NOTHING or alias.target is None:
        record(draft, place, spelled, f"nothing ({alias.why})")
        return None
    return alias.target if write(draft, alias.target, ours, place, spelled, translated=ours != value) else None


def write(draft: Draft, target: KeyPath, value: object, place: Place, spelled: str, *, translated: bool = True) -> bool:
    """Write one of tunekit's keys. If the key is already written, add a problem and return False."""
    if draft.has(target):
        other = draft.place(target)
        what = f"{spelled} and {other.spelled or dotted(target)} ({other}) mean the same setting"
        complain(draft, place, spelled, what, "keep one")
        return False
    holder = draft.values.get(str(target[0]), {})
    if not isinstance(holder, dict):
        complain(draft, place, spelled, f"{target[0]} ({draft.place(target[:1])}) is not a mapping")
        return False
    draft.set(target, value, Place(place.file, place.line, spelled))
    if draft.places[target[:1]].spelled:  # an alias created the section, so it has no spelling
        draft.places[target[:1]] = place
    text = "null" if value is None else show(value)  # as in the recipe
    shown = f": {text}" if translated and not isinstance(value, list | dict) else ""
    record(draft, place, spelled, f"{dotted(target)}{shown}")
    return True


def write_unlimited(draft: Draft, place: Place, spelled: str, *, packing: bool) -> None:
    """Write data.max_length and data.excess_length for a tool that neither drops nor truncates rows. `packing`: whether
    it packs rows, which needs a limit."""
    if packing:
        complain(draft, place, spelled, "packing needs the length of a packed row", "write data.max_length")
        return
    write(draft, ("data", "max_length"), UNLIMITED, place, spelled)
    write(draft, ("data", "excess_length"), "error", place, spelled)


def take(draft: Draft, name: str) -> tuple[Any, Place] | None:
    """Remove a top-level key. Returns its value and place; None if it is absent or empty."""
    if not draft.has((name,)):
        return None
    place = draft.place((name,))
    value = draft.remove((name,))
    if value is None:
        record(draft, place, name, "nothing (it is empty)")
        return None
    return value, place


def record(draft: Draft, place: Place, spelled: str, what: str) -> None:
    draft.rewrites.append(f"{place}: {spelled} -> {what}")


def complain(draft: Draft, place: Place, spelled: str, what: str, how: str = "") -> None:
    draft.problems.append(Problem(what, how, file=place.file, line=place.line, key=spelled))
