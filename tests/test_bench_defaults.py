"""scripts/bench/run defaults: the rows of its sets, its plain baselines, and the choice of settings."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """scripts/bench/defaults.py."""
    before = sys.path[:]
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_defaults", BENCH / "defaults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture
def sets(bench: ModuleType) -> ModuleType:
    """scripts/bench/beside/default_sets.py."""
    return sys.modules["beside.default_sets"]


def unit(validation: float, rows: str = "0110", **values: Any) -> dict[str, Any]:
    usual = {
        "test": 0.5,
        "steps": 100,
        "rows_per_step": 16,
        "cpu_seconds": 30.0,
        "train_cpu_seconds": 20.0,
        "step_cpu_seconds": 0.2,
    }
    return {"validation": validation, "rows": {"test": rows}, **usual, **values}


def test_no_text_is_both_learned_and_measured(sets: ModuleType, shared: Path) -> None:
    for name, each in sets.SETS.items():
        parts = each.parts(shared / "data")
        learned, chosen, measured = ({sets.question(row) for row in parts[part]} for part in parts)
        assert learned, name
        assert len(parts["train"]) >= 0.9 * each.train, name
        assert min(len(parts["validation"]), len(parts["test"])) >= 20, name
        assert not learned & (chosen | measured), name
        assert not {json.dumps(row) for row in parts["validation"]} & {json.dumps(row) for row in parts["test"]}, name
    first, again, other = (sets.SETS["binary-50"].parts(shared / "data", draw) for draw in (0, 0, 1))
    assert first == again
    assert first["test"] == other["test"]
    assert first["train"] != other["train"]
    assert sum(each.kept_apart for each in sets.SETS.values()) == 2


def test_the_plan_is_within_its_cost(bench: ModuleType, sets: ModuleType) -> None:
    """The runs of all sets of which a unit is measured take less than 14 hours of CPU time."""
    names, units = list(sets.SETS), bench.read_units(BENCH.parent / "results" / "defaults.jsonl")
    assert len([name for name in names if sets.SETS[name].base == "encoder"]) >= 12
    assert "?" in bench.listing({}, names, "init")
    keys = [key for name in names for key in bench.keys_of(name, units, "init")]
    assert len(keys) == len(set(keys))
    assert sum(bench.predicted(key, units, "init") or 0.0 for key in keys) < 14 * 3600


def test_baselines_find_words_and_scores_have_one_scale(sets: ModuleType) -> None:
    train = [{"text": f"{word} {at}", "label": word} for at in range(9) for word in ("good", "bad", "bad", "odd")]
    test = [{"text": f"so {word}", "label": word} for word in ("good", "bad", "odd", "odd")]
    found = sets.baselines("label", train, test)
    assert found["tfidf"] == [1.0] * 4
    assert found["majority"] == [0.0, 1.0, 0.0, 0.0]
    numbers = [{"text": f"{'big ' * at}end", "label": float(at)} for at in range(4)]
    assert sets.score("number", [1.5] * 4, numbers) == pytest.approx([1 - 1.8, 1 - 0.2, 1 - 0.2, 1 - 1.8])
    assert sum(sets.baselines("number", numbers * 3, numbers)["majority"]) == pytest.approx(0.0)
    several = [{"text": "a b", "label": ["a", "b"]}]
    assert sets.score("labels", [["a"]], several) == pytest.approx([2 / 3])
    tagged = [{"words": ["an", "oat", "latte"], "tags": ["O", "B-ITEM", "I-ITEM"]}]
    assert sets.baselines("tags", tagged, tagged) == {"majority": [0.0], "word": [1.0]}


def test_validation_rows_choose_and_test_rows_report(bench: ModuleType) -> None:
    cells = bench.grid(bench.SETS["binary-200"])
    assert len(cells) == 10
    units = {f"binary-200|{side}|0": unit(0.6, test=0.9) for side in cells}
    units[f"binary-200|{cells[5]}|0"] = unit(0.7, test=0.1)
    assert bench.best("binary-200", units)[:2] == [cells[5], cells[0]]  # of equal ones, the one with fewer steps
    keys = [key for key in bench.keys_of("binary-200", units, "new") if bench.side_of(key, units, "new") == "best"]
    assert keys == [f"binary-200|{side}|{seed}" for side in (cells[5], cells[0]) for seed in (1, 2)]
    units |= {f"binary-200|new|{seed}": unit(0.6, "1110") for seed in range(3)}
    mean, half = bench.difference([unit(0, "1110"), unit(0, "1111")], [unit(0, "0110"), unit(0, "0110")])
    assert mean == pytest.approx(37.5)
    assert half == pytest.approx(1.96 * 47.87 / 2, rel=1e-3)
    assert "| +25.0 ± 49.0 |" in bench.table(units, "new")


def test_a_torn_line_is_measured_again(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "defaults.jsonl"
    bench.add_unit(path, "a|plain|0", {"cpu_seconds": 1.0})
    path.write_text(path.read_text("utf-8") + '{"unit": "b|pl', "utf-8")
    assert list(bench.read_units(path)) == ["a|plain|0"]
    bench.add_unit(path, "b|plain|0", {"cpu_seconds": 2.0})
    assert bench.read_units(path) == {"a|plain|0": {"cpu_seconds": 1.0}, "b|plain|0": {"cpu_seconds": 2.0}}


@pytest.mark.drawn
@pytest.mark.parametrize("key", ["binary-50|init|0", "tags-220|grid 0.001 2|0", "dpo-220|grid 0.001 2|0"])
def test_a_unit_is_measured(
    key: str, bench: ModuleType, shared: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEKIT_SHARED", str(shared))
    bases = dict.fromkeys(("encoder", "decoder"), str(tiny_llama))
    measured = bench.measure(key, bases, tmp_path / "unit")
    parts = bench.SETS[key.partition("|")[0]].parts(bench.shared_data())
    assert len(measured["rows"]["test"]) == len(parts["test"])
    assert 0 <= measured["test"] <= 1
    assert measured["rows_per_step"] * measured["steps"] == 32 or "init" in key
