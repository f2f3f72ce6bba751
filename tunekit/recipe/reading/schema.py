"""What a recipe may hold, for editors (JSON Schema) and for people (reference text)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

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
    """A key of the reference."""

    name: str
    type: str
    default: str
    meaning: str


def schema_text() -> str:
    """The JSON Schema as a file holds it."""
    return json.dumps(make_schema(), indent=1) + "\n"


def make_schema() -> JsonSchema:
    """The JSON Schema of a recipe file."""
    definitions: JsonSchema = {}
    properties: JsonSchema = {}
    for name in Recipe.model_fields:
        if name in DEFAULT_METHOD:
            properties[name] = _named_schema(name, definitions)
            continue
        owner = section_class(name, None)
        if owner is not None:
            properties[name] = _schema_of(owner, definitions)
    properties["model"] = {"anyOf": [TEXT, properties["model"]]}
    _add_source_shorthands(properties["data"]["properties"])
    trackers = properties["output"]["properties"]["report_to"]
    properties["output"]["properties"]["report_to"] = {"anyOf": [trackers["items"], {"const": "none"}, trackers]}
    _add_known_names(definitions["Source"], properties["evaluation"])
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
    """Each key with its type, default and meaning, a line each, section by section."""
    lines: list[str] = []
    for name in Recipe.model_fields:
        if name not in DEFAULT_METHOD:
            lines += _reference_of(name, section_class(name, None))
            continue
        for method in known_names(kind_of(name)):
            owner = settings_class(kind_of(name), method)
            lines += _reference_of(name, owner)
            rate = getattr(owner, "default_learning_rate", None)
            if rate is not None:
                lines[-1:] = [f"  training.learning_rate is {rate.value:g} unless written ({rate.source})", ""]
    for start in known_names("starts"):
        lines += _reference_of("adapter.start", settings_class("starts", start))
    lines += _reference_of("data.train.N", Source)
    for kind in ("formats", "metrics"):
        lines += [f"{kind}:", *(f"  {name:<20} {facts_of(kind, name).DESCRIPTION}" for name in known_names(kind)), ""]
    lines.append("names of other tools, accepted where they put them:")
    for name in sorted(TOP_LEVEL):
        target = alias_target(name)
        if target:
            lines.append(f"  {name:<30} {dotted(target)}")
    return "\n".join(lines) + "\n"


def _schema_of(owner: Any, definitions: JsonSchema) -> JsonSchema:
    """One section's schema; what it refers to goes into the definitions."""
    schema: JsonSchema = _in_standard_words(owner.model_json_schema())
    definitions.update(schema.pop("$defs", {}))
    return schema


def _in_standard_words(schema: Any) -> Any:
    """Bounds that pydantic leaves in its own words, because a validator stands before them, in JSON Schema's; without
    the titles that it makes of the keys' names."""
    if isinstance(schema, list):
        return [_in_standard_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: value for name, value in schema.items() if name != "title" or not isinstance(value, str)}
    return {_STANDARD.get(name, name): _in_standard_words(value) for name, value in kept.items()}


def _named_schema(name: str, definitions: JsonSchema) -> JsonSchema:
    """`adapter` and `objective`: a name, or the settings of one method; the default method need not be named."""
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
    """A model may be its name alone, and a list of mappings one of them."""
    told = {"description": field["description"]} if "description" in field else {}
    if field.get("$ref") == "#/$defs/ModelSection":
        return {**told, "anyOf": [TEXT, {"$ref": field["$ref"]}]}
    if field.get("type") == "array" and "$ref" in field["items"]:
        return {**told, "anyOf": [field["items"], {"type": "array", "minItems": 1, "items": field["items"]}]}
    return field


def _add_source_shorthands(data: JsonSchema) -> None:
    """A path, a source, or a list of either."""
    source: JsonSchema = {"$ref": "#/$defs/Source"}
    several = {"type": "array", "minItems": 1, "items": {"anyOf": [TEXT, source]}}
    fraction = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    for name, choices in (("train", []), ("eval", [fraction, {"type": "null"}])):
        description = data[name].get("description", "")
        data[name] = {"description": description, "anyOf": [TEXT, source, several, *choices]}


def _add_known_names(source: JsonSchema, evaluation: JsonSchema) -> None:
    source["properties"]["format"]["enum"] = ["auto", *known_names("formats")]
    evaluation["properties"]["metrics"]["items"] = {"enum": list(known_names("metrics"))}


def _alias_schema(name: str) -> JsonSchema:
    target = alias_target(name)
    return {
        "deprecated": True,
        "description": f"another tool's name of {dotted(target)}" if target else "another tool's",
    }


def _reference_of(title: str, owner: Any) -> list[str]:
    """One section of the reference text."""
    lines = [f"{title}: {first_line(owner)}"]
    for key in reference_keys(owner):
        lines.append(f"  {key.name:<28} {key.type:<52} {key.default:<12} {key.meaning}".rstrip())
    return [*lines, ""]


def reference_keys(owner: Any) -> list[Key]:
    """Every key of a section or of a method's settings, in words."""
    schema: JsonSchema = owner.model_json_schema()
    required = schema.get("required", [])
    return [
        Key(
            name,
            _type_words(field),
            "required" if name in required else _default_words(field.get("default", {})),
            field.get("description", ""),
        )
        for name, field in schema["properties"].items()
    ]


def first_line(owner: Any) -> str:
    """What a section or a method's settings say of themselves."""
    return str(owner.model_json_schema().get("description", "")).partition("\n")[0]


def _default_words(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else yaml_scalar(value)


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
