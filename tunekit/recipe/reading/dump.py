"""Writes a recipe with all its keys as YAML, for the run folder. A text is quoted if a YAML reader could read it as
another type."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tunekit.basics import JsonObject
from tunekit.errors import MAX_LINES, Problem, first_lines, redact
from tunekit.recipe.reading.draft import Draft, KeyPath, dotted
from tunekit.recipe.reading.paths import named_paths, relative_path
from tunekit.recipe.reading.yaml_reader import read_scalar
from tunekit.recipe.recipe import Recipe

_BARE = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
MAX_COMMENT = 300  # maximum characters of a line
_BREAKS = {ord(mark): " " for mark in "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"}  # they would end a comment
_TAKEN_FOR_BOOLEAN = {"y", "n", "yes", "no", "on", "off"}  # by readers of YAML 1.1
# some of these reverse the text in a terminal
_ESCAPED = re.compile("[\x7f-\xa0\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")


def dump_recipe(recipe: Recipe, relative_to: Path, *, written_only: bool = False) -> str:
    """The recipe as YAML. Absolute paths are written relative to the folder of the new file.

    `written_only`: leave out keys that are not written in the recipe, so that they have their defaults.
    """
    return _dump(recipe.model_dump(mode="json", exclude_unset=written_only), relative_to)


def dump_draft(draft: Draft, problems: Sequence[Problem], relative_to: Path) -> str:
    """A draft as YAML, without the keys that have problems."""
    for problem in reversed(
        problems
    ):  # the last item of a list first, so that the indices of earlier items do not change
        if draft.has(key := _key(problem, spelled=False)):
            draft.remove(key)
    order = list(Recipe.model_fields)
    return _dump(dict(sorted(draft.values.items(), key=lambda item: order.index(item[0]))), relative_to)


def as_comments(problems: Sequence[Problem], written: Draft) -> str:
    """The problems as YAML comments. The YAML lines of the key follow each problem. `written`: the user's draft."""
    lines: list[str] = []
    for problem in problems[:MAX_LINES]:
        lines.append(str(problem))
        if written.has(key := _key(problem, spelled=True)):
            lines += [f"  {line}" for line in first_lines(yaml_lines({dotted(key): written.get(key)}))]
    if len(problems) > MAX_LINES:
        lines.append(f"... and {len(problems) - MAX_LINES:,} more")
    return "".join(f"# {redact(line.translate(_BREAKS))[:MAX_COMMENT]}\n" for line in lines)


def _key(problem: Problem, *, spelled: bool) -> KeyPath:
    """The key of a problem. If the problem names two keys, as in `training.epochs (written num_epochs)`, `spelled`
    selects the second key."""
    name, _, other = (problem.key or "").removesuffix(")").partition(" (written ")
    return tuple(int(part) if part.isdecimal() else part for part in ((spelled and other) or name).split("."))


def _dump(values: JsonObject, relative_to: Path) -> str:
    for path in named_paths(values):
        path.write(relative_path(path.text, relative_to))
    return "\n".join(yaml_lines(values)) + "\n"


def yaml_scalar(value: object) -> str:
    """One scalar as YAML text. Reading that text gives the same value."""
    if isinstance(value, str):
        bare = (
            _BARE.fullmatch(value) and value.lower() not in _TAKEN_FOR_BOOLEAN and isinstance(read_scalar(value), str)
        )
        quoted = json.dumps(value, ensure_ascii=False)
        return value if bare else _ESCAPED.sub(lambda found: f"\\u{ord(found.group()):04x}", quoted)
    if isinstance(value, float):
        mantissa, _, exponent = repr(value).partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if exponent else mantissa
    return json.dumps(value)


def yaml_lines(values: JsonObject, indent: str = "") -> list[str]:
    """Plain values as lines of YAML."""
    lines: list[str] = []
    for name, value in values.items():
        start = f"{indent}{yaml_scalar(name)}:"
        if isinstance(value, dict) and value:
            lines += [start, *yaml_lines(value, f"{indent}  ")]
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            lines.append(start)
            for item in value:  # an invalid list can mix mappings and scalars
                mapping = isinstance(item, dict) and item
                first, *rest = yaml_lines(item, f"{indent}    ") if mapping else [yaml_scalar(item)]
                lines += [f"{indent}  - {first.strip()}", *rest]
        elif isinstance(value, list):
            lines.append(f"{start} [{', '.join(yaml_scalar(item) for item in value)}]")
        else:
            lines.append(f"{start} {{}}" if value == {} else f"{start} {yaml_scalar(value)}")
    return lines
