"""scripts/bench/run methods: the choice of learning rates, and the table of the guide."""

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
def methods() -> Iterator[ModuleType]:
    """scripts/bench/methods.py."""
    before = sys.path[:]
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_methods", BENCH / "methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def unit(loss: float, metric: float = 0.5) -> dict[str, Any]:
    sizes = {"trainable_parameters": 10, "adapter_bytes": 2_000_000, "cpu_seconds": 30.0, "peak_bytes": 10**9}
    return {"choice_loss": loss, "test_loss": loss, "metric": metric, "processor": "x", "date": "2026-01-02", **sizes}


def test_rates_are_tried_until_the_best_one_has_two_worse_neighbours(methods: ModuleType) -> None:
    losses, tried = {}, []
    while (rate := methods.next_rate(losses, 1e-3)) is not None:
        tried.append(rate)
        losses[rate] = abs(rate - 1e-2) if rate < 3e-2 else float("inf")
    assert tried == [1e-3, 3e-4, 3e-3, 1e-2, 3e-2]


def test_the_other_seeds_have_the_chosen_rate_and_nothing_is_repeated(methods: ModuleType) -> None:
    units = {f"orders|IA3|{rate}|0": unit(loss) for rate, loss in (("0.003", 2.0), ("0.01", 1.0), ("0.03", 3.0))}
    assert methods.next_key(units, "orders", "IA3", 0) is None
    assert methods.next_key(units, "orders", "IA3", 1) == "orders|IA3|0.01|1"
    units["orders|IA3|0.01|1"] = unit(1.0)
    assert methods.next_key(units, "orders", "IA3", 1) is None
    units["orders|IA3|0.01|0"] = {"failed": "not finite"}
    assert methods.next_key(units, "orders", "IA3", 0) == "orders|IA3|0.001|0"


def test_the_table_needs_all_methods_and_seeds(methods: ModuleType) -> None:
    units = {}
    for name in methods.BASES:
        for method in methods.ADAPTERS:
            at = methods.RATES.index(methods.FIRST_RATES[method])
            for step in (-1, 0, 1):
                rate = methods.RATES[at + step]
                for seed in range(1 if step else 3):
                    units[f"{name}|{method}|{rate:g}|{seed}"] = unit(1.0 + abs(step), 0.5 + seed / 10)
    table = methods.guide_table(units)
    assert "| DoRA | 60.0% (50.0% to 70.0%) | 60.0% (50.0% to 70.0%) | 1.00, 1.00 | 1.00, 1.00 | 2, 2 |" in table
    assert "Measured on 2026-01-02, three seeds" in table
    assert methods.results_page(units).count("\n| banking |") == len(methods.ADAPTERS)
    del units[f"orders|full|{methods.FIRST_RATES['full']:g}|2"]
    assert methods.guide_table(units) == methods.NOT_MEASURED


def test_the_guide_has_the_table_of_the_results(methods: ModuleType) -> None:
    file, page = BENCH.parent / "results" / "methods.json", (methods.PAGES / "method.md").read_text("utf-8")
    units = json.loads(file.read_text("utf-8")) if file.exists() else {}
    assert methods.filled(page, "quality", methods.guide_table(units)) == page, "run `scripts/bench/run methods --page`"
