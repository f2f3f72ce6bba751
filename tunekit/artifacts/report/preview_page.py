"""The page of `tunekit preview --html`, which shows rows as coloured tokens and needs no network."""

from collections.abc import Mapping, Sequence

from tunekit.artifacts.report.html import render


def preview_page(
    title: str, rows: Sequence[Mapping[str, object]], facts: Sequence[tuple[str, object]], notes: Sequence[str]
) -> str:
    """The page as HTML. `rows`: {heading, parts: [{title, tokens: [{text, title, kinds}], image: data URL or None}]}.

    The letters in `kinds` of a token mean: t trained on, p prompt, o other text, s special token. All text from the
    data is escaped.
    """
    page = {"title": title, "rows": rows, "facts": list(facts), "notes": list(notes)}
    return render("preview.html.jinja", page)
