"""Plain values that folders of all levels use: JSON objects, sizes as text, and the facts that an objective shows.

They are separate from records.py because `validate` needs only these, and defining a frozen dataclass takes a
millisecond.
"""

from dataclasses import dataclass
from typing import Any

JsonObject = dict[str, Any]  # a JSON object


@dataclass(frozen=True)
class Headline:
    """The main number of a step, for progress, the first chart and the report. `rises`: a good run raises it."""

    name: str = "loss"
    title: str = "Training loss"
    rises: bool = False


@dataclass(frozen=True)
class Panel:
    """A table of the report. Its examples are in the records of some steps, under `key`.

    `columns`: label and key of each column; a value that is a mapping has one column per name.
    """

    title: str
    key: str
    columns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Stall:
    """A sign that nothing is learned: the logged share `metric` is 1 in `steps` consecutive steps. `action`: what to
    do."""

    metric: str
    steps: int
    meaning: str
    action: str


@dataclass(frozen=True)
class Shows:
    """The facts about an objective that progress, report and preview show."""

    unit: str = "supervised token"  # the unit that the loss sums over
    size_unit: str = "token"  # the unit of a row's size
    headline: Headline = Headline()
    draws: str = ""  # for models that generate images: the objective's key with their prompts
    panels: tuple[Panel, ...] = ()
    stalled: tuple[Stall, ...] = ()

    @property
    def units(self) -> str:
        """The plural of `unit`, such as "supervised tokens" or "pairs"."""
        return f"{self.unit}s"

    @property
    def sizes(self) -> str:
        """The plural of `size_unit`, such as "tokens" or "frames"."""
        return f"{self.size_unit}s"


DEFAULT_SHOWS = Shows()


def with_article(noun: str) -> str:
    """The noun after "a" or "an"."""
    return f"{'an' if noun[:1] in tuple('aeiou') else 'a'} {noun}"


def bytes_text(count: float) -> str:
    """A number of bytes with its unit: 1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
