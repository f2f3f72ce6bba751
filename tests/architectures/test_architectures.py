"""Every cell of every architecture passes, or is refused by a sentence that helps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architectures.cells import CELLS, run_architecture, table
from tests.architectures.tiny import write_tiny

pytestmark = pytest.mark.slow
NAMES = Path(__file__).with_name("names.txt").read_text("utf-8").split()


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, dict[str, str]]]:
    """What was tried, printed as one table at the end."""
    cells: dict[str, dict[str, str]] = {}
    yield cells
    print(f"\n{table(cells)}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_every_cell_passes_or_is_refused_by_name(
    name: str, found: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    found[name] = run_architecture(write_tiny(name, tmp_path / "model"), tmp_path / "work")
    assert list(found[name]) == list(CELLS)
    assert not {cell: said for cell, said in found[name].items() if said and not said.startswith("refused: ")}
