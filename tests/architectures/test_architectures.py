"""Every model type is right, or is refused before its weights are loaded, as the table of results says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.architectures.cells import CELLS, run_cells, table, verdict
from tests.architectures.tiny import PROMISED, model_types, write_tiny
from tunekit.machine.versions import package

RESULTS = Path(__file__).resolve().parents[2] / "scripts" / "results" / "models.json"
FOUND = json.loads(RESULTS.read_text("utf-8"))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", sorted(model_types().keys() & FOUND.keys()))
@pytest.mark.filterwarnings("ignore")
def test_a_type_is_as_the_table_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    try:
        folder = write_tiny(name, tmp_path / "model")
    except ImportError as error:  # Gemma 3n's encoder of images is timm's
        pytest.skip(" ".join(str(error).split()))
    cells = dict(run_cells(folder, tmp_path / "work"))
    assert list(cells) == list(CELLS)
    assert verdict(cells) == verdict(FOUND[name]["cells"]), {cell: said for cell, said in cells.items() if said}


def test_every_type_is_right_or_refused() -> None:
    verdicts = {name: verdict(row["cells"]) for name, row in FOUND.items()}
    transformers = package("transformers")
    if not transformers.is_newer:  # a newer release may list types that no table has yet
        assert model_types().keys() <= verdicts.keys()
    if transformers.installed == transformers.tested:
        assert verdicts.keys() <= model_types().keys()
    assert {verdicts[name] for name in PROMISED} == {"right"}
    assert set(verdicts.values()) == {"right", "refused"}


def test_the_page_is_made_from_the_results() -> None:
    assert RESULTS.with_suffix(".md").read_text("utf-8") == table(FOUND, PROMISED)
