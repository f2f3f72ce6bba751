"""Reads names of classes from the ClassLabel features that the `datasets` library stores with a data set."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

ClassNames = dict[str, Sequence[str]]  # column -> names of its classes, in the order of their numbers


def class_names(features: object) -> ClassNames:
    """Class names by column, from the features of a data set. Columns with lists of classes (tags) are included."""
    named: ClassNames = {}
    for column, feature in features.items() if isinstance(features, Mapping) else ():
        while (inner := _of_each(feature)) is not None:
            feature = inner
        names = feature.get("names") if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" else None
        if isinstance(names, Sequence) and not isinstance(names, str):
            named[str(column)] = [str(name) for name in names]
    return named


def _of_each(feature: object) -> object:
    """The feature of a list's items. A list feature is `{"feature": ...}` or `[...]`; None for any other feature."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return feature.get("feature") if isinstance(feature, Mapping) else None


def stored_class_names(metadata: Mapping[bytes, bytes] | None) -> ClassNames:
    """Class names by column, from the schema of a Parquet file that `datasets` wrote; {} for other Parquet files."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return class_names(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    return {}


def with_class_names(values: dict[str, Any], names: ClassNames) -> dict[str, Any]:
    """The row with class names in place of class numbers; None for a number without a name (-1 means unlabelled)."""
    return {**values, **{column: _named(values[column], names[column]) for column in names if column in values}}


def _named(value: object, names: Sequence[str]) -> object:
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return names[value] if 0 <= value < len(names) else None
