"""Check a built site: every link and anchor has a target in the site, no page fetches anything from elsewhere, and no
page shows a backtick, which would mean that Markdown code was not rendered.

usage: python scripts/site/check.py FOLDER      exits with 1, and prints each page with its faults
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
AS_WRITTEN = ("pre", "script", "style")  # where a backtick may be meant
IN_STYLES = re.compile(rb"url\(\s*['\"]?(https?:)?//|@import\s+['\"]?(https?:)?//")


class Page(HTMLParser):
    """The links of a page, what it fetches, the anchors in it, and texts with a backtick."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.backticks: list[str] = []
        self._as_written = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self._as_written += tag in AS_WRITTEN
        self.anchors |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if tag in FETCHED and FETCHED[tag] in named and named.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(named[FETCHED[tag]])

    def handle_endtag(self, tag: str) -> None:
        self._as_written -= tag in AS_WRITTEN

    def handle_data(self, data: str) -> None:
        if not self._as_written:
            self.backticks += [line.strip() for line in data.splitlines() if "`" in line]


def faults(folder: Path) -> list[str]:
    """What is wrong, a line each."""
    found = []
    pages = {file.resolve(): Page(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.html"))}
    for file, page in pages.items():
        name = file.relative_to(folder.resolve())
        found += [f"{name}: shows a backtick: {line}" for line in page.backticks]
        if name.name == "404.html":  # whose links begin at the root of whatever serves it
            continue
        for link in (*page.links, *page.fetched):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                found += [f"{name}: fetches {link}"] if link in page.fetched and parts.scheme != "data" else []
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: {link} has no such anchor")
    styles = [file for file in sorted(folder.rglob("*.css")) if IN_STYLES.search(file.read_bytes())]
    return found + [f"{file.relative_to(folder)}: fetches from elsewhere" for file in styles]


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(1 if wrong else 0)
