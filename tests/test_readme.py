"""The README's generated parts are those that the project would write today."""

from __future__ import annotations

import runpy
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_table_of_methods_is_up_to_date() -> None:
    written = runpy.run_path(str(REPOSITORY / "scripts" / "methods"))
    assert written["table"]() in (REPOSITORY / "README.md").read_text(encoding="utf-8"), "run scripts/methods"


def test_the_example_is_the_code() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("```python\nclass Ia3(")[2].partition("```")[0]
    assert shown
    assert f"class Ia3({shown}" in (REPOSITORY / "tunekit/adapters/methods/ia3.py").read_text(encoding="utf-8")
