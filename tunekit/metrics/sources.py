"""The metrics of each source's rows go in; one table of all sources comes out."""

from collections.abc import Mapping
from typing import Any


def sources_table(sources: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[Any]]]:
    """Head and lines, one a source: its rows, then its metrics."""
    names = list(dict.fromkeys(name for values in sources.values() for name in values))
    return ["source", *names], [[source, *map(values.get, names)] for source, values in sources.items()]
