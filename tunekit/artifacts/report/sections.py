"""What a page consists of before it becomes Markdown or HTML: plain frozen values."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MarkedText:
    """A cell of a table: stretches of a text, and whether each is marked."""

    stretches: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class ReportTable:
    """`rows[best]` stands out; `has_texts`: cells hold long texts, which may be broken into lines."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    best: int = -1
    has_texts: bool = False


@dataclass(frozen=True)
class Bar:
    """A total by part: (name, size, the size as text) each. The bars of a section have one scale."""

    title: str
    parts: Sequence[tuple[str, float, str]]


@dataclass(frozen=True)
class Series:
    """One line of a chart; `kind`: line, faint, dash or points; `color`: its number in the page's palette."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str
    color: int


@dataclass(frozen=True)
class Chart:
    """Curves over the steps; `unit`: bytes or nothing; `log`: a logarithmic scale."""

    id: str
    title: str
    unit: str
    log: bool
    series: Sequence[Series]


@dataclass(frozen=True)
class PictureRow:
    """Pictures of one prompt, each with a title."""

    prompt: str
    pictures: Sequence[tuple[str, Path]]


@dataclass(frozen=True)
class ReportSection:
    """One part of a page; whatever is empty is not shown."""

    title: str = ""
    paragraphs: Sequence[str] = ()
    warnings: Sequence[str] = ()
    tiles: Sequence[tuple[str, str, str]] = ()  # name, value and note of the most important numbers
    charts: Sequence[Chart] = ()
    bars: Sequence[Bar] = ()
    tables: Sequence[ReportTable] = ()
    pictures: Sequence[PictureRow] = ()
    commands: Sequence[str] = ()
    files: Sequence[tuple[str, str]] = ()  # name and text of each


@dataclass(frozen=True)
class ReportPage:
    """A whole page; `verdict`: its result in a sentence, which is bad news if `failed`."""

    title: str
    intro: Sequence[str]
    sections: Sequence[ReportSection]
    verdict: str = ""
    failed: bool = False
