"""The generated parts of the written pages are those that the project would write today."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = REPOSITORY / "scripts" / "site" / "pages"


def test_the_table_of_methods_is_up_to_date() -> None:
    written = runpy.run_path(str(REPOSITORY / "scripts" / "methods"))
    assert written["table"]() in (PAGES / "choosing.md").read_text(encoding="utf-8"), "run scripts/methods"


def test_the_example_is_the_code() -> None:
    page = (PAGES / "architecture.md").read_text(encoding="utf-8")
    shown = page.partition("```python\nclass Ia3(")[2].partition("```")[0]
    assert shown
    assert f"class Ia3({shown}" in (REPOSITORY / "tunekit/adapters/methods/ia3.py").read_text(encoding="utf-8")


def test_the_loop_that_a_page_quotes_is_the_loop() -> None:
    shown = (PAGES / "run.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    assert shown.startswith("    def train(self)")
    assert shown in (REPOSITORY / "tunekit/training/run.py").read_text(encoding="utf-8")


def test_the_files_and_functions_that_a_page_names_exist() -> None:
    text = (PAGES / "run.md").read_text(encoding="utf-8")
    files = re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text)
    assert len(files) > 15
    assert [file for file in files if not (REPOSITORY / "tunekit" / file).exists()] == []
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tunekit").rglob("*.py"))
    names = {name for name in re.findall(r"`(?:\w+\.)?([a-z_]+)`", text) if "_" in name}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) < 120
    places = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", readme)]
    assert len(places) > 10
    assert [place for place in places if not (REPOSITORY / place).exists()] == []
