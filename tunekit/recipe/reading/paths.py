"""Makes paths absolute when a recipe is read, and relative to the recipe's file when a recipe is written.

Paths in a file are relative to that file, and paths on the command line to the working folder. `~` is the home folder.
Hub names and `$VAR` are not changed.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import Any

from tunekit.recipe.bases.paths import PathMark, is_like_path, relative_to
from tunekit.recipe.bases.section import Section
from tunekit.recipe.reading.draft import COMMAND_LINE, Draft, KeyPath
from tunekit.recipe.reading.sections import inner_class, section_class, sections_in, types_in

_CONTROL = re.compile("[\x01-\x1f]")
LONGEST_NAME_BYTES = 255
LONGEST_PATH_BYTES = 4096


@dataclass(frozen=True)
class NamedPath:
    """A path in a recipe's plain values: its key, its text, and the mapping or list that contains it (`holder`)."""

    key: KeyPath
    mark: PathMark
    text: str
    holder: dict[Any, Any] | list[Any]

    @property
    def file(self) -> Path:
        """The file or folder. For FILE.py:NAME this is FILE.py."""
        return Path(self.text.rpartition(":")[0] if self.mark.expected == "code" else self.text)

    def write(self, text: str) -> None:
        """Replace the text in its holder."""
        place = self.key[-1]
        if isinstance(self.holder, list):
            self.holder[int(place)] = text
        else:
            self.holder[place] = text


def named_paths(values: Mapping[str, Any]) -> list[NamedPath]:
    """Every path in a recipe's plain values, including hub names."""
    paths = list[NamedPath]()
    for key, owner, holder in sections_in(values):
        for name, mark in path_marks(owner).items():
            value = holder.get(name)
            if isinstance(value, str) and value:
                paths.append(NamedPath((*key, name), mark, value, holder))
            if isinstance(value, list):
                texts = [(at, text) for at, text in enumerate(value) if isinstance(text, str) and text]
                paths += [NamedPath((*key, name, at), mark, text, value) for at, text in texts]
    return paths


@cache
def path_marks(owner: type[Section]) -> dict[str, PathMark]:
    """The keys of a settings class whose values are paths, with their path marks."""
    marks = {
        name: next(
            (part for part in (*field.metadata, *types_in(field.annotation)) if isinstance(part, PathMark)), None
        )
        for name, field in owner.model_fields.items()
    }
    return {name: mark for name, mark in marks.items() if mark is not None}


def path_mark(key: str, values: Mapping[str, object]) -> PathMark | None:
    """The path mark of a dotted key; None if the key's value is not a path."""
    first, *places, name = key.split(".")
    owner = section_class(first, {"method": values.get(f"{first}.method")})
    for place in places:
        if owner is not None and not place.isdigit():
            owner = inner_class(owner.model_fields[place], None) if place in owner.model_fields else None
    return None if owner is None else path_marks(owner).get(name)


def resolve_paths(draft: Draft, folder: Path) -> None:
    """Make every local path of the draft absolute, in place. A text that cannot be a file name is a problem."""
    for path in named_paths(draft.values):
        fault = _fault(path.text)
        if fault:
            draft.add_problem(path.key, fault, "write a shorter path" if "long" in fault else "")
            continue
        base = Path.cwd() if draft.place(path.key).file == COMMAND_LINE else folder
        absolute = os.path.normpath(base / os.path.expanduser(path.text))
        is_pattern = path.mark.expected == "rows" and has_magic(path.text)
        is_local = path.mark.endings is None or _is_local(path.text, path.mark.endings) or is_pattern
        if is_local or os.path.lexists(absolute):
            is_run = path.mark.expected == "adapter" and os.path.exists(f"{absolute}/plan.json")
            path.write(f"{absolute}/adapter" if is_run else absolute)  # a run folder: its result


def _is_local(text: str, endings: tuple[str, ...]) -> bool:
    """Whether a text looks like a path, not like a name on the hub."""
    return is_like_path(text) or text.lower().endswith(endings)


def relative_path(path: str, folder: Path) -> str:
    """An absolute path, rewritten relative to `folder`. Hub names and other texts are not changed."""
    if not os.path.isabs(path):
        return path
    relative = relative_to(path, folder)
    return relative if relative.startswith("..") or os.path.isabs(relative) else f"./{relative}"


def _fault(text: str) -> str | None:
    """The reason why a text cannot be a file name, or is probably a mistake; None if it is a valid file name."""
    if "\0" in text:
        return "contains a NUL character, which no path can contain"
    if control := _CONTROL.search(text):
        escape = "in double quotes a backslash begins an escape: use single quotes, or / in paths"
        return f"contains the character U+{ord(control.group()):04X}; {escape}"
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return "contains characters that no file name can have"
    if len(encoded) > LONGEST_PATH_BYTES or any(
        len(os.fsencode(part)) > LONGEST_NAME_BYTES for part in Path(text).parts
    ):
        return "is too long for a file name"
    return None


def code_keys(value: object, place: str = "") -> Iterator[str]:
    """The keys of a recipe's plain values that let Python code run: of a model's folder, or a reward's file."""
    items: Iterable[tuple[object, object]]
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, item in items:
        if name in ("trust_remote_code", "allow_code") and item is True:
            yield f"{place}{name}"
        yield from code_keys(item, f"{place}{name}.")
