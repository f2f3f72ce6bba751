"""Plain values that all parts of tunekit use: JSON objects, sizes as text, and facts about an objective for the screen
and the report.

They are separate from records.py for speed: `validate` needs only these, and defining a frozen dataclass takes a
millisecond.
"""

from dataclasses import dataclass
from typing import Any

JsonObject = dict[str, Any]  # a JSON object
NORMAL_95 = 1.959964  # half the width of a 95 % interval in standard errors, of the normal distribution


@dataclass(frozen=True)
class Headline:
    """The main number of a step; it is in the progress line, the first chart and the report. `rises`: whether the
    number grows in a good run."""

    name: str = "loss"
    title: str = "Training loss"
    rises: bool = False


@dataclass(frozen=True)
class Panel:
    """A table of examples in the report. The examples are in the records of some steps, under `key`.

    `columns`: label and key of each column. If the value of a key is a mapping, each of its names has a column.
    """

    title: str
    key: str
    columns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Stall:
    """A sign that nothing is learned: the logged share `metric` is 1 in `steps` consecutive steps. `action`: advice for
    the user."""

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


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution with `freedom` degrees of freedom, to 1 %.

    Source: Abramowitz and Stegun 1964, 26.7.5; exact for one and two degrees.
    """
    if freedom <= 2:
        return (12.7062, 4.3027)[freedom - 1]
    z = NORMAL_95
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def reach_of_equal(value: float, count: int) -> float:
    """Half of a 95 % interval of a mean if all `count` numbers are equal to `value`: 2 |value| (1 - 0.025^(1 / count)).

    Their spread is 0, but so few equal numbers do not show that all others are equal too. At least the share
    0.025^(1 / count) of them is; the others may be as far from `value` as its opposite. As in a sign test, 0 is outside
    of the interval only from 6 numbers on.    Source: Clopper and Pearson 1934.
    """
    return 2 * abs(value) * (1 - 0.025 ** (1 / count))


def with_article(noun: str) -> str:
    """The noun, preceded by "a" or "an"."""
    return f"{'an' if noun[:1] in tuple('aeiou') else 'a'} {noun}"


def bytes_text(count: float) -> str:
    """A number of bytes with its unit: 1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
