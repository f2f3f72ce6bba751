"""Describes the keys of a recipe: as a JSON Schema for editors, and as a reference text for people."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunekit.recipe.bases.section import Section
from tunekit.recipe.data import Source
from tunekit.recipe.foreign.table import IN_ADAPTER, TOP_LEVEL, alias_target
from tunekit.recipe.reading.draft import dotted
from tunekit.recipe.reading.dump import yaml_scalar
from tunekit.recipe.reading.names import facts_of, known_names, settings_class
from tunekit.recipe.reading.sections import kind_of, section_class
from tunekit.recipe.recipe import DEFAULT_METHOD, Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"
JsonSchema = dict[str, Any]
TEXT: JsonSchema = {"type": "string", "minLength": 1}
_STANDARD = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}


@dataclass(frozen=True)
class Key:
    """A recipe key as the reference text shows it; all fields are text."""

    name: str
    type: str
    default: str
    meaning: str


def schema_text() -> str:
    """The JSON Schema as the text of a file."""
    return json.dumps(make_schema(), indent=1) + "\n"


def make_schema() -> JsonSchema:
    """The JSON Schema of a recipe file."""
    definitions: JsonSchema = {}
    properties: JsonSchema = {
        name: _named_schema(name, definitions) if name in DEFAULT_METHOD else _schema_of(owner, definitions)
        for name, owner in _sections()
    }
    properties["model"] = {"anyOf": [TEXT, properties["model"]]}
    properties["sweep"] = {"anyOf": [{"type": "null"}, properties["sweep"]]}
    _add_source_shorthands(properties["data"]["properties"])
    output = properties["output"]["properties"]
    output["report_to"] = {"anyOf": [output["report_to"]["items"], {"const": "none"}, output["report_to"]]}
    definitions["Source"]["properties"]["format"]["enum"] = ["auto", *known_names("formats")]
    properties["evaluation"]["properties"]["metrics"]["items"] = {"enum": list(known_names("metrics"))}
    foreign = {name: _alias_schema(name) for name in TOP_LEVEL}
    return {
        "$schema": DIALECT,
        "title": "tunekit recipe",
        "type": "object",
        "properties": {**properties, **foreign},
        "additionalProperties": False,
        "$defs": definitions,
    }


def make_reference() -> str:
    """The reference text: one line per key, with its type, default and meaning, section by section."""
    lines: list[str] = []
    for name, section in _sections():
        methods = known_names(kind_of(name)) if name in DEFAULT_METHOD else ()
        owners: list[type[Section]] = [settings_class(kind_of(name), method) for method in methods]
        for owner in owners or [section]:
            lines += _reference_of(name, owner)
            rate = getattr(owner, "default_learning_rate", None)
            if rate is not None:
                lines[-1:] = [f"  training.learning_rate is {rate.value:g} by default ({rate.source})", ""]
    for start in known_names("starts"):
        lines += _reference_of("adapter.start", settings_class("starts", start))
    lines += _reference_of("data.train.N", Source)
    for kind in ("formats", "metrics"):
        lines += [f"{kind}:", *(f"  {name:<20} {facts_of(kind, name).DESCRIPTION}" for name in known_names(kind)), ""]
    lines.append("keys of other tools, accepted at the same places as in those tools:")
    targets = {name: alias_target(name) for name in sorted(TOP_LEVEL)}
    lines += [f"  {name:<30} {dotted(target)}" for name, target in targets.items() if target]
    return "\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, type[Section]]]:
    """The name and the settings class of each section. For adapter and objective: the class of the default method."""
    for name in Recipe.model_fields:
        if (owner := section_class(name, None)) is not None:
            yield name, owner


def _schema_of(owner: type[Section], definitions: JsonSchema) -> JsonSchema:
    """The schema of one section. Schemas that this schema refers to are added to `definitions`."""
    schema: JsonSchema = _in_standard_words(owner.model_json_schema())
    definitions.update(schema.pop("$defs", {}))
    return schema


def _in_standard_words(schema: object) -> Any:
    """The schema with bounds renamed from pydantic's words (`ge`) to JSON Schema's (`minimum`), and without titles.

    pydantic uses its own words for fields with a validator, and makes a title from each key's name.
    """
    if isinstance(schema, list):
        return [_in_standard_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: value for name, value in schema.items() if name != "title" or not isinstance(value, str)}
    return {_STANDARD.get(name, name): _in_standard_words(value) for name, value in kept.items()}


def _named_schema(name: str, definitions: JsonSchema) -> JsonSchema:
    """The schema of `adapter` or `objective`: a name, or the settings of one method. A mapping without `method` has the
    default method."""
    methods = known_names(kind_of(name))
    choices = [_schema_of(settings_class(kind_of(name), method), definitions) for method in methods]
    for method, choice in zip(methods, choices, strict=True):
        choice["properties"]["method"] = {"const": method, "default": method}
        for key, field in choice["properties"].items():
            choice["properties"][key] = _with_shorthand(field)
        if method != DEFAULT_METHOD[name]:
            choice["required"] = [*choice.get("required", []), "method"]
        if name == "adapter":
            choice["properties"].update({alias: _alias_schema(alias) for alias in IN_ADAPTER})
    names = list(methods) + (["qlora"] if name == "adapter" else [])
    return {"anyOf": [{"enum": names}, *choices]}


def _with_shorthand(field: JsonSchema) -> JsonSchema:
    """The schema of a field with its short forms: a name for a model section, one mapping for a list of mappings."""
    described = {key: text for key, text in field.items() if key == "description"}
    if field.get("$ref") == "#/$defs/ModelSection":
        return {**described, "anyOf": [TEXT, {"$ref": field["$ref"]}]}
    if field.get("type") == "array" and "$ref" in field["items"]:
        return {**described, "anyOf": [field["items"], {"type": "array", "minItems": 1, "items": field["items"]}]}
    return field


def _add_source_shorthands(data: JsonSchema) -> None:
    """Allow short forms of data.train and data.eval: a path, a source, or a list of paths and sources."""
    source = {"$ref": "#/$defs/Source"}
    several = {"type": "array", "minItems": 1, "items": {"anyOf": [TEXT, source]}}
    fraction = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    for name, choices in (("train", []), ("eval", [fraction, {"type": "null"}])):
        data[name] = {"description": data[name]["description"], "anyOf": [TEXT, source, several, *choices]}


def _alias_schema(name: str) -> JsonSchema:
    target = alias_target(name)
    description = f"another tool's name for {dotted(target)}" if target else "a key of another tool"
    return {"deprecated": True, "description": description}


def _reference_of(title: str, owner: type[Section]) -> list[str]:
    """The lines of one section in the reference text."""
    keys = reference_keys(owner)
    lines = [f"  {key.name:<28} {key.type:<52} {key.default:<12} {key.meaning}".rstrip() for key in keys]
    return [f"{title}: {first_line(owner)}", *lines, ""]


def reference_keys(owner: type[Section]) -> list[Key]:
    """Every key of a settings class, as the reference text shows it. The keys of a mapping in a list follow the list's
    key: `reward.weight` after `reward`."""
    schema = owner.model_json_schema()
    return list(_keys_of(schema, schema.get("$defs", {})))


def _keys_of(schema: JsonSchema, definitions: JsonSchema, before: str = "") -> Iterator[Key]:
    """The keys of one mapping. `before`: the text before their names."""
    for name, field in schema["properties"].items():
        value = field.get("default", {})
        default = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else yaml_scalar(value)
        default = "required" if name in schema.get("required", ()) else default
        yield Key(f"{before}{name}", _type_words(field), default, field.get("description", ""))
        inner = field.get("items", {}).get("$ref", "").rpartition("/")[2]
        if inner and inner != Source.__name__:  # a source has its own part of the reference
            yield from _keys_of(definitions[inner], definitions, f"{before}{name}.")


def first_line(owner: type[Section]) -> str:
    """The first paragraph of a settings class's docstring, as one line."""
    return " ".join(str(owner.model_json_schema().get("description", "")).partition("\n\n")[0].split())


def _type_words(field: JsonSchema) -> str:
    """A JSON Schema type in a few words."""
    if "enum" in field:
        return "|".join(choice if isinstance(choice, str) else yaml_scalar(choice) for choice in field["enum"])
    if "const" in field:
        return str(field["const"])
    for group in ("anyOf", "oneOf"):
        if group in field:
            return "|".join(dict.fromkeys(_type_words(choice) for choice in field[group]))
    if "$ref" in field:
        return "source" if field["$ref"].endswith("/Source") else "mapping"
    if field.get("type") == "array":
        return f"[{_type_words(field.get('items', {}))}]"
    if field.get("type") == "object" and "additionalProperties" in field:
        return f"{{name: {_type_words(field['additionalProperties'])}}}"
    words = {"string": "text", "integer": "whole number", "boolean": "true|false"}
    return words.get(field.get("type", ""), str(field.get("type", "anything")))
