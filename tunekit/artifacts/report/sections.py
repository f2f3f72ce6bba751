"""The parts of a page as plain values, which can be written as Markdown or as HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Tone = Literal["good", "neutral", "bad"]


@dataclass(frozen=True)
class MarkedText:
    """A table cell with a text in which some substrings are marked."""

    stretches: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class ReportTable:
    """A table. `best`: the index of the row to highlight; `has_texts`: whether cells contain long texts, which may be
    wrapped."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    best: int = -1
    has_texts: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar whose parts add up to a total. Each part is (name, size, size as text). All bars of a section have the same
    scale."""

    title: str
    parts: Sequence[tuple[str, float, str]]


@dataclass(frozen=True)
class Series:
    """One curve of a chart. `kind`: line, faint, dash or points; `color`: the number of its colour in the page."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str
    color: int


@dataclass(frozen=True)
class Chart:
    """A chart of curves over the steps. `unit`: bytes, or empty; `log`: use a logarithmic scale."""

    id: str
    title: str
    unit: str
    log: bool
    series: Sequence[Series]


@dataclass(frozen=True)
class ValueAxis:
    """A vertical axis. `ticks`: texts with their heights, 0 at the bottom to 1 at the top."""

    title: str
    ticks: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class AxisLine:
    """A line that crosses all axes of parallel coordinates. `kind`: best, unclear or other; `color`: the number of its
    colour in the page; None: grey."""

    label: str
    heights: Sequence[float]
    kind: str
    color: int | None = None


@dataclass(frozen=True)
class ParallelAxes:
    """Parallel coordinates."""

    axes: Sequence[ValueAxis]
    lines: Sequence[AxisLine]


@dataclass(frozen=True)
class PictureRow:
    """Images for one prompt, each with a title."""

    prompt: str
    pictures: Sequence[tuple[str, Path]]


@dataclass(frozen=True)
class ReportSection:
    """A section of a page. Empty fields are not shown."""

    title: str = ""
    paragraphs: Sequence[str] = ()
    warnings: Sequence[str] = ()
    tiles: Sequence[tuple[str, str, str]] = ()  # name, value and note of the most important numbers
    charts: Sequence[Chart] = ()
    axes: ParallelAxes | None = None
    bars: Sequence[Bar] = ()
    tables: Sequence[ReportTable] = ()
    pictures: Sequence[PictureRow] = ()
    commands: Sequence[str] = ()
    files: Sequence[tuple[str, str]] = ()  # name and text of each file


@dataclass(frozen=True)
class ReportPage:
    """A whole page. `verdict`: a sentence with the result; `tone`: the colour of its box."""

    title: str
    intro: Sequence[str]
    sections: Sequence[ReportSection]
    verdict: str = ""
    tone: Tone = "neutral"
