"""Applies overrides of the command line (KEY=VALUE, ~KEY) to the Draft, by the same rules as for the file.

Values are read as YAML. Keys are dotted; a number in a key is the index of a list item. Other tools' names are allowed.
"""

from collections.abc import Mapping, Sequence
from typing import get_origin

from tunekit.errors import Problem, RecipeError
from tunekit.recipe.foreign.rewrite import rewrite_aliases
from tunekit.recipe.foreign.table import alias_target, is_alias
from tunekit.recipe.reading.draft import COMMAND_LINE, Draft, KeyPath, Place, dotted
from tunekit.recipe.reading.problems import unknown_key
from tunekit.recipe.reading.sections import fields_at
from tunekit.recipe.reading.shorthands import expand_shorthands
from tunekit.recipe.reading.suggest import show
from tunekit.recipe.reading.yaml_reader import read_yaml

HERE = Place(COMMAND_LINE)


def apply_overrides(draft: Draft, overrides: Sequence[str]) -> None:
    """Apply the overrides in order. After `adapter=lora`, `adapter.r=8` is allowed, but not a second `adapter=`."""
    changed: set[KeyPath] = set()
    foreign = Draft(COMMAND_LINE)
    for text in overrides:
        if text.startswith("~"):
            _remove(draft, text[1:], changed)
        else:
            _assign(draft, foreign, text, changed)
        expand_shorthands(draft)
    _settle_foreign(draft, foreign, changed)


def apply_values(draft: Draft, values: Mapping[str, tuple[object, Place]]) -> None:
    """Apply the values of a trial. `values`: dotted key -> value, and the place where the value is written."""
    changed: set[KeyPath] = set()
    foreign = Draft(draft.file)
    for name in sorted(values, key=lambda name: name.count(".")):  # a section before the keys inside it
        _write(draft, foreign, name, *values[name], changed)
        expand_shorthands(draft)
    _settle_foreign(draft, foreign, changed)


def _settle_foreign(draft: Draft, foreign: Draft, changed: set[KeyPath]) -> None:
    """Translate the keys of other tools in `foreign`, and write them to the draft under tunekit's names."""
    expand_shorthands(foreign)
    rewrite_aliases(foreign)
    draft.problems.extend(foreign.problems)
    draft.rewrites.extend(foreign.rewrites)
    for key, place in foreign.places.items():  # aliases write keys of two parts, SECTION.KEY
        if len(key) == 2 and _is_new(draft, key, changed):
            _set(draft, key, foreign.get(key), place)
    expand_shorthands(draft)


def _assign(draft: Draft, foreign: Draft, text: str, changed: set[KeyPath]) -> None:
    name, equals, value_text = text.partition("=")
    if not equals:
        _complain(draft, show(text), "is neither KEY=VALUE nor ~KEY", "write, for example, training.epochs=2")
        return
    try:
        value_draft = read_yaml(value_text, COMMAND_LINE)
    except RecipeError as error:
        _complain(draft, name, error.problems[0].what, "quote the value: KEY='\"...\"'")
        return
    if value_draft.problems:
        _complain(draft, name, value_draft.problems[0].what, value_draft.problems[0].how)
        return
    _write(draft, foreign, name, value_draft.values, HERE, changed)


def _write(draft: Draft, foreign: Draft, name: str, value: object, place: Place, changed: set[KeyPath]) -> None:
    """Write a value under a dotted key; a key of another tool goes to `foreign`."""
    key = parse_key(name, draft)
    if key is None:
        _complain(draft, show(name), "is not a dotted key", "write, for example, training.epochs=2", place)
    elif is_alias(key) or (key == ("adapter",) and value == "qlora"):
        if _is_new(draft, key, changed):
            foreign.set(key, value, place)
    elif _is_new(draft, key, changed):
        _set(draft, key, value, place)


def _set(draft: Draft, key: KeyPath, value: object, place: Place) -> None:
    """Write one value. It is a problem if a value on the way to the key is neither a mapping nor a long enough list."""
    holder = draft.values
    for length, part in enumerate(key):
        in_list = isinstance(holder, list) and isinstance(part, int) and part <= len(holder)
        fits = isinstance(holder, dict) or in_list
        if not fits:
            inner = f"has {len(holder)} items" if isinstance(holder, list) else f"is {show(holder)}, not a mapping"
            first = dotted((*key[:length], 0, *key[length:]))
            how = f"write {first}" if isinstance(holder, list) and isinstance(part, str) else ""
            _complain(draft, dotted(key), f"{dotted(key[:length])} {inner}", how, place)
            return
        at_end = isinstance(holder, list) and part == len(holder)
        holder = {} if at_end else holder.get(part, {}) if isinstance(holder, dict) else holder[part]
        if at_end and length < len(key) - 1:
            draft.set(key[: length + 1], {}, place)
            holder = draft.get(key[: length + 1])
    draft.set(key, value, place)


def _remove(draft: Draft, name: str, changed: set[KeyPath]) -> None:
    key = parse_key(name, draft)
    if key is None:
        _complain(draft, show(name), "is not a dotted key", "write, for example, ~training.epochs")
        return
    key = (alias_target(str(key[-1])) or key) if is_alias(key) else key
    if not _is_new(draft, key, changed):
        return
    if draft.has(key):
        draft.remove(key)
    elif isinstance(key[-1], int) or key[-1] not in fields_at(key[:-1], draft):
        if isinstance(key[-1], int):
            _complain(draft, dotted(key), "the list has no such item", "")
        else:
            draft.places[key] = HERE
            draft.problems.append(unknown_key(key, draft))
            draft.forget(key)


def parse_key(name: str, draft: Draft) -> KeyPath | None:
    """`data.train.0.path` -> ("data", "train", 0, "path"); None if a part is empty.

    The keys inside rank_pattern and columns are names, which can contain dots. So the text after rank_pattern or
    columns is one name.
    """
    parts = name.split(".")
    if not all(parts) or not name.isprintable() or any(part != part.strip() for part in parts):
        return None
    key: list[str | int] = []
    for position, part in enumerate(parts):
        field = fields_at(tuple(key[:-1]), draft).get(str(key[-1])) if key else None
        if field is not None and get_origin(field.annotation) is dict:
            return (*key, ".".join(parts[position:]))
        is_index = part.isdecimal() and len(part) < 6 and len(key) > 1
        key.append(int(part) if is_index else part)
    return tuple(key)


def _is_new(draft: Draft, key: KeyPath, changed: set[KeyPath]) -> bool:
    """Whether the command line names this key for the first time. Naming it twice is a problem."""
    if key in changed:
        _complain(draft, dotted(key), "is given twice", "keep one")
        return False
    changed.add(key)
    return True


def _complain(draft: Draft, name: str, what: str, how: str, place: Place = HERE) -> None:
    draft.problems.append(Problem(what, how, file=place.file, line=place.line, key=name))
