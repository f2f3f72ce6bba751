"""The page of `tunekit preview --html`: rows as coloured tokens, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from tunekit.artifacts.report.html import render


class PreviewToken(TypedDict):
    """A token; of its kinds t is trained on, p prompt, o other text, s a special token."""

    text: str
    title: str
    kinds: str


class PreviewPart(TypedDict):
    """A part of a row; `image`: a data address."""

    title: str
    tokens: list[PreviewToken]
    image: str | None


class PreviewRow(TypedDict):
    """A row of the page."""

    heading: str
    parts: list[PreviewPart]


def preview_page(
    title: str, rows: Sequence[PreviewRow], facts: Sequence[tuple[str, object]], notes: Sequence[str]
) -> str:
    """Everything that comes from the data is escaped."""
    of_text = any(part["tokens"] for row in rows for part in row["parts"])
    page = {"title": title, "rows": rows, "facts": list(facts), "notes": list(notes), "of_text": of_text}
    return render("preview.html.jinja", page)
