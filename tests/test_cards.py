"""scripts/bench/run cards: predictions for GPUs that are not in the machine, and the tables of the guide."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cards() -> Iterator[ModuleType]:
    """scripts/bench/cards.py."""
    before = sys.path[:]
    spec = importlib.util.spec_from_file_location("bench_cards", REPOSITORY / "scripts" / "bench" / "cards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses read it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path[:] = before


def test_the_tables_of_the_guide_are_those_of_the_results(cards: ModuleType) -> None:
    known = json.loads(cards.RESULTS.read_text(encoding="utf-8"))["cases"]
    assert {case.name for case in cards.cases()} == set(known)
    for name, (page, make) in cards.TABLES.items():
        text = (cards.PAGES / page).read_text(encoding="utf-8")
        assert cards.filled(text, name, make(known)) == text, f"{page}: run `scripts/bench/run cards --page`"


@pytest.mark.drawn
def test_missing_cases_are_simulated_and_known_ones_stay(cards: ModuleType, tmp_path: Path) -> None:
    file, names = tmp_path / "cards.json", ("full", "LoRA", "QLoRA", "LoRA, streamed")
    cases = [cards.Case("tiny", length=256, **cards.METHODS[name]) for name in names]
    cases.append(cards.Case("tiny", length=256, rows=4, recomputed=False))
    assert cards.simulate_missing(0.0, file, lambda: cases) == len(cases)
    assert cards.simulate_missing(10.0, file, lambda: cases[:1]) == 0
    first = json.loads(file.read_text(encoding="utf-8"))["cases"]
    assert cards.simulate_missing(10.0, file, lambda: cases) == 0
    known = json.loads(file.read_text(encoding="utf-8"))["cases"]
    assert known[cases[0].name] == first[cases[0].name]
    full, lora, qlora, streamed, large = (known[case.name] for case in cases)
    assert 12.0 < full["optimizer"] / full["parameters"] < 12.1  # a gradient and two moments in float32
    assert qlora["weights"] < lora["weights"] < full["weights"]
    assert streamed["weights"] < lora["weights"]
    assert large["activations"] > 4 * lora["activations"]
