"""Writes a page of sections as one HTML file that needs no network, such as report.html."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from tunekit import __version__
from tunekit.artifacts.report.pictures import inlined
from tunekit.artifacts.report.sections import Bar, ReportPage
from tunekit.console.text import cell_text
from tunekit.errors import redact

COLORS = 7  # number of the colours of bars in page.css
RAW = {"uplot_css": "uplot.css", "uplot_js": "uplot.js", "uplot_license": "uplot-license.txt", "page_js": "page.js"}


@cache
def _asset(name: str) -> str:
    return files("tunekit.artifacts.report").joinpath("assets", name).read_text("utf-8")


def html_page(page: ReportPage) -> str:
    """The page as HTML."""
    charts = [asdict(chart) for section in page.sections for chart in section.charts]
    for chart in charts:
        chart["series"] = [{**series, "label": redact(series["label"])} for series in chart["series"]]
    data = json.dumps({"charts": charts}, separators=(",", ":")).replace("<", "\\u003c")
    raw = {name: _asset(file) for name, file in RAW.items()}
    return render("page.html.jinja", page, **raw, charts="yes" if charts else "", data=data)


def render(template: str, page: object, **raw: str) -> str:
    """Fill a template of the assets with values. Access tokens in values are redacted; `raw` is inserted unchanged."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_without_secrets)
    environment.filters |= {"cell": _cell, "inlined": inlined, "scaled": _scaled}
    text = environment.from_string(_asset(template))
    return text.render(page=page, version=__version__, page_css=_asset("page.css"), **raw)


def _without_secrets(value: object) -> object:
    return redact(value) if type(value) is str else value  # values that are marked as safe have a different type


def _cell(value: object) -> str:
    return "–" if value is None else cell_text(value)


def _scaled(bars: Sequence[Bar]) -> list[list[tuple[str, str, str, int]]]:
    """For each bar, its parts as (name, size as text, percent of the longest bar, number of the colour)."""
    longest = max(sum(size for _, size, _ in bar.parts) for bar in bars)
    names = list(dict.fromkeys(name for bar in bars for name, _, _ in bar.parts))
    return [
        [(name, text, f"{100 * size / longest:.2f}", names.index(name) % COLORS) for name, size, text in bar.parts]
        for bar in bars
    ]
