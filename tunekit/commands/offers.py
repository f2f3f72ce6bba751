"""Completions of shipped recipes' names and of KEY=VALUE.

Keys and values come from the schema file, because importing pydantic's classes takes too long for a completion.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunekit.errors import TunekitError
from tunekit.recipe.reading.shipped import SCHEMA_NAME, first_comment, shipped_folder, shipped_recipes
from tunekit.recipe.reading.yaml_reader import read_recipe_file, read_scalar

Completions = list[tuple[str, str]]
SchemaFields = dict[str, dict[str, Any]]  # dotted key -> its part of the schema


def complete_shipped_name(prefix: str) -> Completions:
    """Names of shipped recipes with their descriptions."""
    return [(name, first_comment(file)) for name, file in shipped_recipes().items() if name.startswith(prefix)]


def complete_name(key: str, prefix: str) -> list[str]:
    """The possible values of a key; for a list such as `evaluation.metrics`, the possible values of its items."""
    field = _fields({}).get(key, {})
    return [name for name in _values(field.get("items", field)) if name.startswith(prefix)]


def complete_override(prefix: str, recipe: str | None, earlier: Sequence[str] = ()) -> Completions:
    """Completions of KEY=VALUE and ~KEY. `earlier`: the overrides before this one. If several sections
    match, only their names are offered, without their keys."""
    written = _written(recipe, earlier)
    fields = _fields(written)
    key, equals, value = prefix.removeprefix("~").partition("=")
    if prefix.startswith("~"):
        return [(f"~{name}", _meaning(field)) for name, field in fields.items() if name.startswith(key)]
    if equals:
        field = fields.get(key, {})
        return [(f"{key}={each}", "") for each in _values(field, written.get(key)) if each.startswith(value)]
    fitting = {name: field for name, field in fields.items() if name.startswith(key)}
    sections = list(dict.fromkeys(name.partition(".")[0] for name in fitting))
    if len(fitting) == 1:
        ((name, field),) = fitting.items()
        return [(f"{name}={each}", _meaning(field)) for each in _values(field, written.get(name)) or [""]]
    if len(sections) > 1:
        return [(f"{section}.", "") for section in sections]
    return [(f"{name}=", _meaning(field)) for name, field in fitting.items()]


def _fields(written: dict[str, Any]) -> SchemaFields:
    """All keys of all sections; in `adapter` and `objective`, the keys of the chosen methods."""
    try:
        schema = json.loads((shipped_folder() / SCHEMA_NAME).read_bytes())
    except (TunekitError, OSError, ValueError):
        return {}  # a completion shows no errors
    fields: SchemaFields = {}
    for name, section in schema["properties"].items():
        names, *choices = section.get("anyOf", [{}, section])
        if "enum" in names:  # adapter and objective: a method's name, or its settings
            fields[name] = names
            default = next(choice for choice in choices if "method" not in choice.get("required", []))
            methods = {choice["properties"]["method"]["const"]: choice for choice in choices}
            choices = [methods.get(written.get(f"{name}.method", written.get(name)), default)]
            choices[0]["properties"]["method"] = names
        for choice in choices:
            for key, field in choice.get("properties", {}).items():
                if not field.get("deprecated"):
                    fields[f"{name}.{key}"] = field
    source = schema["$defs"]["Source"]["properties"]
    return fields | {f"data.train.0.{key}": field for key, field in source.items()}


def _written(recipe: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a recipe and of overrides, by dotted key. An unreadable file gives no values."""
    written: dict[str, Any] = {}
    try:
        values = read_recipe_file(Path(recipe)).values if recipe else {}
    except (TunekitError, OSError):
        values = {}
    for name, section in values.items():
        inner = section if isinstance(section, dict) else {None: section}
        written |= {f"{name}.{key}" if key else name: value for key, value in inner.items()}
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals:
            written[key] = read_scalar(value)
            if "." not in key:  # replaces the whole section
                written = {name: old for name, old in written.items() if not name.startswith(f"{key}.")}
    return written


def _values(field: dict[str, Any], written: object = None) -> list[str]:
    """Possible values of a key: the names that the schema lists, else the value in the recipe, else the default."""
    names = list(dict.fromkeys(_names(field)))
    known = written if written is not None else field.get("default")
    plain = isinstance(known, str | int | float) and not isinstance(known, bool)
    return names if len(names) > 1 or not plain else [*names, f"{known:g}" if isinstance(known, float) else str(known)]


def _names(field: dict[str, Any]) -> Iterator[str]:
    """All values that the schema lists for a key: names, numbers, true, false and null."""
    if field.get("type") == "boolean":
        yield from ("true", "false")
    listed = [*field.get("enum", []), *([field["const"]] if "const" in field else [])]
    yield from (each if isinstance(each, str) else json.dumps(each) for each in listed)
    if field.get("type") == "null":
        yield "null"
    if isinstance(field.get("items"), dict):
        yield from (f"[{name}]" for name in _names(field["items"]))
    for choice in field.get("anyOf", field.get("oneOf", [])):
        yield from _names(choice)


def _meaning(field: dict[str, Any]) -> str:
    return str(field.get("description", "")).partition("\n")[0]
