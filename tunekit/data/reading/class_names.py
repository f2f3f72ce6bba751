"""Names of classes: a data set's own description (ClassLabel of datasets) gives one to each number of a column."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

ClassNames = dict[str, Sequence[str]]  # of a column, in the order of its numbers


def class_names(features: object) -> ClassNames:
    """The names that the features of a data set state, also of lists of classes (tags), by column."""
    named: ClassNames = {}
    for column, feature in features.items() if isinstance(features, Mapping) else ():
        while (inner := _of_each(feature)) is not None:
            feature = inner
        names = feature.get("names") if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" else None
        if isinstance(names, Sequence) and not isinstance(names, str):
            named[str(column)] = [str(name) for name in names]
    return named


def _of_each(feature: object) -> object:
    """The feature of a list's members, written `{"feature": ...}` or `[...]`; None where it is no list."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return feature.get("feature") if isinstance(feature, Mapping) else None


def stored_class_names(metadata: Mapping[bytes, bytes] | None) -> ClassNames:
    """The names that datasets wrote into the schema of a Parquet file; none where it is not from there."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return class_names(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    return {}


def with_class_names(values: dict[str, Any], names: ClassNames) -> dict[str, Any]:
    """The row with names in place of the numbers of classes; None for a number without one (-1: not labelled)."""
    return {**values, **{column: _named(values[column], names[column]) for column in names if column in values}}


def _named(value: object, names: Sequence[str]) -> object:
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return names[value] if 0 <= value < len(names) else None
