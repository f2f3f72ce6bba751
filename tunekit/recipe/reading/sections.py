"""The settings class of each mapping in a recipe, derived from the fields of the settings classes."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

from tunekit.basics import JsonObject
from tunekit.recipe.bases.section import Section
from tunekit.recipe.reading.draft import Draft, KeyPath, inner_items
from tunekit.recipe.reading.names import SettingsKind, known_names, settings_class
from tunekit.recipe.recipe import DEFAULT_METHOD, Recipe


def kind_of(section: str) -> SettingsKind:
    """The kind of names that a section can use: adapter -> adapters, objective -> objectives."""
    return "adapters" if section == "adapter" else "objectives"


def section_class(name: str, values: object) -> type[Section] | None:
    """The settings class of a section; None if its method is unknown. `values`: the section's values in the recipe."""
    if name not in DEFAULT_METHOD:
        return inner_class(Recipe.model_fields[name], values) if name in Recipe.model_fields else None
    method = values.get("method", DEFAULT_METHOD[name]) if isinstance(values, dict) else DEFAULT_METHOD[name]
    return settings_class(kind_of(name), method) if method in known_names(kind_of(name)) else None


def inner_class(field: FieldInfo, value: object) -> type[Section] | None:
    """The settings class of a key's value, such as objective.teacher. If the value is a list: the class of its items.

    If the key allows several classes, the `method` in the value selects one. None if no class fits.
    """
    classes = [kind for kind in types_in(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
    if len(classes) < 2:
        return classes[0] if classes else None
    name = value.get("method") if isinstance(value, dict) else value
    return next((kind for kind in classes if kind.model_fields["method"].default == name), None)


def types_in(kind: object) -> Iterator[object]:
    """A type, the types inside it, and the metadata of Annotated."""
    yield kind
    for inner in get_args(kind):
        yield from types_in(inner)


def fields_at(section: KeyPath, draft: Draft) -> Mapping[str, FieldInfo]:
    """The known keys of the section at this place of the recipe; empty if no section is there."""
    if not section:
        return Recipe.model_fields
    owner = section_class(str(section[0]), draft.values.get(str(section[0])))
    for length, name in enumerate(section[1:], 2):
        if owner is None or isinstance(name, int):
            continue
        field = owner.model_fields.get(name)
        owner = inner_class(field, draft.get(section[:length])) if field else None
        if owner is None and field and isinstance(field.default, Section):  # no class is named: use the default
            owner = type(field.default)
    return owner.model_fields if owner else {}


def sections_in(values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, type[Section], JsonObject]]:
    """Every section and inner section in a recipe's plain values: its key, settings class and mapping."""
    for name in Recipe.model_fields:
        yield from _sections_at((name,), section_class(name, values.get(name)), values.get(name))


def _sections_at(
    key: KeyPath, owner: type[Section] | None, value: object
) -> Iterator[tuple[KeyPath, type[Section], JsonObject]]:
    if owner is not None and isinstance(value, list):
        for index, inner in inner_items(value):
            yield from _sections_at((*key, index), owner, inner)
    elif owner is not None and isinstance(value, dict):
        yield key, owner, value
        for name, field in owner.model_fields.items():
            yield from _sections_at((*key, name), inner_class(field, value.get(name)), value.get(name))
