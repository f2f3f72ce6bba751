"""Questions that a new user types into the site's search, and the page that must be the first result."""

from __future__ import annotations

import importlib.util
import math
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
import yaml

SITE = Path(__file__).resolve().parent.parent / "scripts" / "site"
QUESTIONS = {
    "two GPUs": "guide/several-gpus",
    "SLURM": "guide/cluster",
    "GGUF": "guide/elsewhere",
    "hub": "guide/elsewhere",
    "lm-eval": "tasks",
    "wandb": "working",
    "100 GB": "guide/large-data",
    "out of memory": "guide/out-of-memory",
    "OOM": "guide/out-of-memory",
    "which method": "guide/method",
    "12 GB": "guide/cards",
    "12GB": "guide/cards",
    "my loss is flat": "guide/odd-loss",
    "resume on another machine": "guide/resume",
    "CI": "guide/ci",
    "license of what I train": "guide/privacy",
    "what leaves my machine": "guide/privacy",
    "ner": "tutorials/token-classify",
}
TITLE_BOOST = 1000.0  # of the theme's search
STOPPED = {"a", "and", "is", "i", "in", "my", "of", "on", "or", "that", "the", "to", "what", "which"}
FIRST_RESULTS = "[...document.querySelectorAll('.md-search-result__item')].map(item => item.querySelector('a').href)"


def separator() -> re.Pattern[str]:
    """What separates the words of the site's search."""
    plugins = yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))["plugins"]
    return re.compile(next(plugin["search"]["separator"] for plugin in plugins if "search" in plugin))


def test_each_question_finds_its_page_first() -> None:
    """A small copy of the search's ranking, of the written pages: rare words count more, and words of titles most."""
    between, sections = separator(), []

    def words(text: str) -> list[str]:
        return [word for word in between.split(text.lower()) if word and word not in STOPPED]

    for file in sorted((SITE / "pages").rglob("*.md")):
        name = file.relative_to(SITE / "pages").with_suffix("").as_posix()
        for level, part in re.findall(r"^(#+) (.*?)(?=^#|\Z)", file.read_text(encoding="utf-8"), re.M | re.S):
            title, _, text = part.partition("\n")
            sections.append((name, words(title), set(words(text)), len(level)))

    def match(word: str, candidates: Collection[str]) -> float:
        return 1.0 if word in candidates else 0.5 * any(each.startswith(word) for each in candidates)

    wrong = {}
    for question, page in QUESTIONS.items():
        scores = [0.0] * len(sections)
        for word in words(question):
            matches = [(match(word, title), match(word, text)) for _, title, text, _ in sections]
            rarity = math.log(1 + len(sections) / (1 + sum(max(each) > 0 for each in matches)))
            for at, (_, title, _, level) in enumerate(sections):
                boost = TITLE_BOOST / level / (10 + len(title))
                scores[at] += rarity * (boost * matches[at][0] + matches[at][1])
        first = sections[scores.index(max(scores))][0]
        if first != page:
            wrong[question] = first
    assert wrong == {}


@pytest.mark.slow
def test_the_search_of_the_site_works_from_a_folder_and_finds_each_page_first(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is absent: scripts/docs installs it")
    from playwright.sync_api import sync_playwright

    from tests.artifacts.test_html_browser import browser_path

    runpy.run_path(str(SITE / "generate.py"))["write"](tmp_path / "pages")
    shutil.copyfile(SITE / "mkdocs.yml", tmp_path / "mkdocs.yml")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "-f", str(tmp_path / "mkdocs.yml")], check=True)
    results = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(120_000)
        for question in QUESTIONS:
            tab.goto((tmp_path / "html" / "index.html").as_uri())
            tab.locator(".md-search__input").press_sequentially(question)
            tab.wait_for_function(f"{FIRST_RESULTS}.length > 0")
            tab.wait_for_timeout(1000)  # the list is complete
            results[question] = tab.evaluate(FIRST_RESULTS)[0]
        browser.close()
    wrong = {name: results[name] for name, page in QUESTIONS.items() if f"/{page}.html" not in results[name]}
    assert wrong == {}
