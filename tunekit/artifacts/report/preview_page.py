"""The page of `tunekit preview --html`: rows as coloured tokens go in, a text that needs no network comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunekit.artifacts.report.html import render


def preview_page(
    title: str, rows: Sequence[dict[str, Any]], facts: Sequence[tuple[str, object]], notes: Sequence[str]
) -> str:
    """`rows`: {heading, parts: [{title, tokens: [{text, title, kinds}], image: data address or None}]}; of a token's
    kinds t is trained on, p prompt, o other text, s a special token. Everything that comes from the data is escaped."""
    of_text = any(part["tokens"] for row in rows for part in row["parts"])
    page = {"title": title, "rows": rows, "facts": list(facts), "notes": list(notes), "of_text": of_text}
    return render("preview.html.jinja", page)
