"""The page of `tunekit data rank`: four lists of training rows, each with the reason and the nearest rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.sections import MarkedText, ReportPage, ReportSection, ReportTable

Stretches = Sequence[tuple[str, bool]]  # pieces of a row's text, each with whether it is trained on


@dataclass(frozen=True)
class RankedRow:
    """A row of a list. `place`: its file and line. `near`: the places and texts of its nearest rows."""

    place: str
    text: Stretches
    why: str
    near: Sequence[tuple[str, Stretches]] = ()


@dataclass(frozen=True)
class RankedList:
    """A list of rows, worst first. `meaning`: why rows are in it. `missing`: why the list could not be made; empty if
    it was made. `total`: the number of rows in it, of which `rows` are shown."""

    title: str
    meaning: str
    rows: Sequence[RankedRow] = ()
    total: int = 0
    missing: str = ""


def rows_count(count: int) -> str:
    """A number of rows in words."""
    return "1 row" if count == 1 else f"{count:,} rows"


def rank_page(run: str, notes: Sequence[str], lists: Sequence[RankedList]) -> str:
    """The page as HTML. `notes`: how the lists were made, and how reliable they are."""
    sections = [_section(each) for each in lists]
    return html_page(ReportPage(f"Training rows of {run}, ranked", notes, sections))


def _section(ranked: RankedList) -> ReportSection:
    title = f"{ranked.title[:1].upper()}{ranked.title[1:]}"
    if ranked.missing:
        return ReportSection(title, [ranked.meaning], warnings=[ranked.missing])
    shown = rows_count(ranked.total) + (
        f"; the first {len(ranked.rows):,} are shown" if ranked.total > len(ranked.rows) else ""
    )
    rows = [[row.place, MarkedText(row.text), row.why, MarkedText(_near_text(row))] for row in ranked.rows]
    table = ReportTable(["row", "text", "why", "nearest rows"], rows, has_texts=True)
    return ReportSection(title, [f"{ranked.meaning} {shown}."], tables=[table] if rows else [])


def _near_text(row: RankedRow) -> list[tuple[str, bool]]:
    text: list[tuple[str, bool]] = []
    for place, stretches in row.near:
        text += [(f"{place}: ", False), *stretches, ("\n", False)]
    return text
