"""The pages in headless Chromium: no error, no request, nothing wider than the screen, no serious fault of access.

TUNEKIT_BROWSER names another browser; one must be there for the slow tier.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.run_case import write_run
from tunekit.artifacts.report.compare import comparison_report
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.pictures import inlined, picture_name
from tunekit.artifacts.report.preview_page import preview_page
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.sweep_page import sweep_page
from tunekit.artifacts.report.sweep_results import sweep_results
from tunekit.artifacts.report.values import read_run
from tunekit.artifacts.run import PICTURES

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TOKENS = [
    {"text": "<|im_start|>", "title": "1: not trained on: prompt", "kinds": "p s"},
    {"text": "two lemon cakes " * 40, "title": "2: trained on", "kinds": "t"},
    {"text": "and" * 200, "title": "3: not trained on: another turn", "kinds": "o"},
    {"text": "<|im_end|>", "title": "4: trained on", "kinds": "t s"},
]
IMAGE = inlined(np.zeros((64, 400, 3), np.uint8))
PREVIEWED: list[dict[str, object]] = [
    {"heading": "rows.jsonl:1: 4 tokens", "parts": [{"title": "chosen", "tokens": TOKENS, "image": None}]},
    {"heading": "photos:1: 25,600 pixels", "parts": [{"title": "a kite" * 60, "tokens": [], "image": IMAGE}]},
]
# cells with two words of a text that end beyond the screen: one would scroll sideways in each line
TEXTS_TO_THE_RIGHT = """[...document.querySelectorAll("td")].filter(cell =>
    /[a-z]{4}.* .*[a-z]{4}/i.test(cell.innerText)
    && cell.getBoundingClientRect().right > innerWidth).map(cell => cell.innerText)"""
# the axes of a sweep may be scrolled sideways
TABLES_WIDER_THAN_THEIR_FRAME = """[...document.querySelectorAll(".scroll:has(table)")].filter(frame =>
    frame.scrollWidth > frame.clientWidth + 1).map(frame => frame.getAttribute("aria-label"))"""


def browser_path() -> str:
    """The browser in which the pages are looked at. Skips the test if there is none."""
    path = os.environ.get("TUNEKIT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        pytest.skip("the pages are looked at in a browser: install chromium, or name one by TUNEKIT_BROWSER")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a short run, a long one, one that goes on, and a comparison of three."""
    folder = tmp_path_factory.mktemp("pages")
    long = read_run(write_run(folder / "long", steps=20_000, rate=1e-4))
    short = [read_run(write_run(folder / f"s{seed}", seed=seed, rate=0.1)) for seed in range(3)]
    going = read_run(write_run(folder / "going", steps=2, finished=False))
    drawn = write_run(folder / "drawn")
    plan = json.loads((drawn / "plan.json").read_text("utf-8"))
    plan["recipe"]["objective"] = {"method": "dreambooth", "validation_prompts": ["a kite", "kite" * 100]}
    (drawn / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (drawn / PICTURES).mkdir()
    for step in (0, 40):
        for number in range(2):
            Image.new("RGB", (512, 384), "navy").save(drawn / picture_name(step, number))
    bad = read_run(write_run(folder / "bad", verdict="worse than the base: eval loss 3 against 2.6"))
    names = [f"learning_rate={run.steps[0]['learning_rate']},r={16 + at}" for at, run in enumerate(short)]
    swept = {name: [run] for name, run in zip(names, short, strict=True)}
    values = {name: {"training.learning_rate": at, "adapter.r": 16 + at % 2} for at, name in enumerate(names)}
    texts = {
        "long": html_page(run_report(long)),
        "short": html_page(run_report(short[0])),
        "going": html_page(run_report(going)),
        "bad": html_page(run_report(bad)),
        "drawn": html_page(run_report(read_run(drawn))),
        "compared": html_page(comparison_report(short)),
        "sweep": html_page(sweep_page(sweep_results("eval.loss", swept), values, ("best.yaml", "model: org/base"))),
        "preview": preview_page("Training rows", PREVIEWED, [("read", 3)], ["rows.jsonl: format chat"]),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("name", ["long", "short", "going", "bad", "drawn", "compared", "sweep", "preview"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_sound(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = pages[name].as_uri()
    page.goto(address)
    assert said == []
    assert asked == [address]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TEXTS_TO_THE_RIGHT) == []
    values = page.evaluate("[...document.querySelectorAll('.u-legend .u-value')].map(value => value.innerText)")
    assert "--" not in values
    assert all(any(letter.isdigit() for letter in value) for value in values)
    assert width > 390 or page.evaluate(TABLES_WIDER_THAN_THEIR_FRAME) == []
    drawn = page.evaluate(
        "[document.querySelectorAll('.plot').length, document.querySelectorAll('.plot canvas').length]"
    )
    assert drawn[0] == drawn[1]
    assert drawn[0] > 0 or name == "preview"
    serious = [
        (violation["id"], [node["target"] for node in violation["nodes"]][:3])
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert serious == []
    context.close()
