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
    "ddp": "guide/several-gpus",
    "2 gpus": "guide/several-gpus",
    "SLURM": "guide/cluster",
    "GGUF": "guide/elsewhere",
    "convert to gguf": "guide/elsewhere",
    "llama.cpp": "guide/elsewhere",
    "push to the hub": "guide/elsewhere",
    "push_to_hub": "guide/elsewhere",
    "lm-eval": "tasks",
    "lm_eval": "tasks",
    "mmlu before and after": "tasks",
    "wandb": "guide/trackers",
    "weights and biases": "guide/trackers",
    "100 GB": "guide/large-data",
    "100GB": "guide/large-data",
    "out of memory": "guide/out-of-memory",
    "not enough memory": "guide/out-of-memory",
    "OOM": "guide/out-of-memory",
    "which method should I take": "guide/method",
    "does it fit in 12 GB": "guide/cards",
    "12GB": "guide/cards",
    "vram": "guide/cards",
    "learning rate": "guide/settings",
    "hyperparameters": "guide/settings",
    "my loss is flat": "guide/odd-loss",
    "loss does not go down": "guide/odd-loss",
    "resume on another machine": "guide/resume",
    "continue training": "guide/resume",
    "move a run to another computer": "guide/resume",
    "CI": "guide/ci",
    "continuous integration": "guide/ci",
    "license of what I train": "guide/privacy",
    "can I sell my model": "guide/privacy",
    "what leaves my machine": "guide/privacy",
    "privacy": "guide/privacy",
    "internet": "guide/privacy",
    "ner": "tutorials/token-classify",
}
TITLE_BOOST, TAG_BOOST = 1e3, 1e6  # of the theme's search
FIRST_RESULTS = "[...document.querySelectorAll('.md-search-result__item')].map(item => item.querySelector('a').href)"


def separator() -> re.Pattern[str]:
    """What separates the words of the site's search."""
    plugins = yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))["plugins"]
    return re.compile(next(plugin["search"]["separator"] for plugin in plugins if "search" in plugin))


def small_words() -> set[str]:
    """The words that search-words.js removes from a query."""
    script = (SITE / "pages" / "assets" / "search-words.js").read_text(encoding="utf-8")
    return set(" ".join(re.findall(r'"([^"\n]*)"', script.partition("new Set(")[2].partition(".split")[0])).split())


def test_each_question_finds_its_page_first() -> None:
    """A small copy of the search's ranking, of the written pages: rare words count more, words of titles much more, and
    tags most."""
    between, small, sections = separator(), small_words(), []
    assert len(small) > 50

    def words(text: str) -> list[str]:
        return [word for word in between.split(text.lower()) if word and word not in small]

    for file in sorted((SITE / "pages").rglob("*.md")):
        name, page = file.relative_to(SITE / "pages").with_suffix("").as_posix(), file.read_text(encoding="utf-8")
        meta = yaml.safe_load(page.split("---\n")[1]) if page.startswith("---\n") else {}
        tags = {tag.lower() for tag in meta.get("tags", [])}
        for level, part in re.findall(r"^(#+) (.*?)(?=^#|\Z)", page, re.M | re.S):
            title, _, text = part.partition("\n")
            sections.append((name, words(title), set(words(text)), tags, len(level)))

    def match(word: str, candidates: Collection[str]) -> float:
        return 1.0 if word in candidates else 0.5 * any(each.startswith(word) for each in candidates)

    wrong = {}
    for question, place in QUESTIONS.items():
        scores = [0.0] * len(sections)
        for word in words(question.replace("weights and biases", "wandb")):
            matches = [
                (match(word, title), match(word, text), match(word, tags)) for _, title, text, tags, _ in sections
            ]
            rarity = math.log(1 + len(sections) / (1 + sum(max(each) > 0 for each in matches)))
            for at, (_, title, _, _, level) in enumerate(sections):
                boost = TITLE_BOOST / level / (10 + len(title))
                scores[at] += rarity * (boost * matches[at][0] + matches[at][1] + TAG_BOOST * matches[at][2])
        first = sections[scores.index(max(scores))][0]
        if first != place:
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
        tab.goto((tmp_path / "html" / "index.html").as_uri())
        for question in QUESTIONS:
            tab.locator(".md-search__input").fill("")
            tab.locator(".md-search__input").press("Backspace")  # the theme listens to keys
            tab.wait_for_function(f"{FIRST_RESULTS}.length == 0")
            tab.locator(".md-search__input").press_sequentially(question)
            tab.wait_for_function(f"{FIRST_RESULTS}.length > 0")
            tab.wait_for_timeout(1000)  # the list is complete
            results[question] = tab.evaluate(FIRST_RESULTS)[0]
        browser.close()
    wrong = {name: results[name] for name, page in QUESTIONS.items() if f"/{page}.html" not in results[name]}
    assert wrong == {}
