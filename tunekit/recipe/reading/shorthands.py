"""Expands short forms in a recipe, such as `model: NAME`, `adapter: lora` and `train: rows.jsonl`, to full forms."""

from typing import get_origin

from pydantic.fields import FieldInfo

from tunekit.recipe.bases.section import Section
from tunekit.recipe.reading.draft import Draft, KeyPath
from tunekit.recipe.reading.sections import inner_class, section_class, types_in
from tunekit.recipe.reading.yaml_reader import read_scalar
from tunekit.recipe.recipe import Recipe

TRACKERS: KeyPath = ("output", "report_to")


def expand_shorthands(draft: Draft) -> None:
    """Replace every short form by its full form, in place. A short form is a text in place of a section, or one section
    in place of a list of sections."""
    for name in Recipe.model_fields:
        _wrap_text(draft, (name,), section_class(name, None))
        _expand(draft, (name,), section_class(name, draft.values.get(name)))
    tracker = draft.get(TRACKERS)
    if isinstance(tracker, str):
        draft.set(TRACKERS, [] if tracker == "none" else [tracker], draft.place(TRACKERS))


def _wrap_text(draft: Draft, key: KeyPath, owner: type[Section] | None) -> None:
    """Replace the text at `key`, if there is one, by a mapping: NAME -> {name_or_path: NAME} for a model."""
    if owner is not None and owner.short and isinstance(draft.get(key), str):
        draft.wrap(key, owner.short)


def _expand(draft: Draft, key: KeyPath, owner: type[Section] | None) -> None:
    """Replace the short forms inside one section."""
    values = draft.get(key)
    if owner is None or not isinstance(values, dict):
        return
    for name in [name for name in values if name in owner.model_fields]:
        field = owner.model_fields[name]
        inner = inner_class(field, values[name])  # None for unknown names, which are refused later
        if inner is not None:
            _expand_value(draft, (*key, name), field, inner)


def _expand_value(draft: Draft, key: KeyPath, field: FieldInfo, owner: type[Section]) -> None:
    """Replace the short forms in the value of a key whose type is a section or a list of sections."""
    value, types = draft.get(key), list(types_in(field.annotation))
    if not any(get_origin(kind) is tuple for kind in types):
        _wrap_text(draft, key, owner)
        _expand(draft, key, owner)
        return
    if isinstance(value, str) and float in types and not isinstance(read_scalar(value), str):
        return  # "0.05" in quotes is a mistake, not a file name; it is refused later
    if isinstance(value, dict) or (isinstance(value, str) and owner.short):
        draft.wrap(key, 0)
    members = draft.get(key)
    for index in range(len(members) if isinstance(members, list) else 0):
        _wrap_text(draft, (*key, index), owner)
        _expand(draft, (*key, index), owner)
