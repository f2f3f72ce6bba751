"""The table of metrics for each source of evaluation rows."""

from collections.abc import Mapping
from typing import Any


def sources_table(sources: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[Any]]]:
    """Header and lines of the table. Each line has the name, the number of rows and the metrics of a source."""
    names = list(dict.fromkeys(name for values in sources.values() for name in values))
    return ["source", *names], [[source, *map(values.get, names)] for source, values in sources.items()]
