"""The table of metrics for each source of evaluation rows."""

from collections.abc import Mapping
from typing import Any


def sources_table(sources: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[Any]]]:
    """Header and lines of the table. A line has a source's number of rows and its metrics."""
    names = list(dict.fromkeys(name for values in sources.values() for name in values))
    return ["source", *names], [[source, *map(values.get, names)] for source, values in sources.items()]
