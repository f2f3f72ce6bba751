"""The table that all parity tests feed: names, counts, gaps, and what fails a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tests.parity.table import CHECKS, FAMILIES, FOLDER, WITHOUT_A_ROW, Cell, Table, entry_of, is_whole_run, verdict
from tests.parity.table import _made as made


def make_cell(**names: str) -> Cell:
    """One that stays out of the real table."""
    cell = Cell(**names)
    made.pop()
    return cell


def entry(row: str, family: str, passed: Sequence[str], failed: Sequence[str] = (), **refused: str) -> dict[str, Any]:
    cell = {"passed": list(passed), "failed": list(failed), "refused": refused}
    return {"method": row, "row": row, "family": family, **cell}


def whole() -> Table:
    """Every method on every family."""
    names = {gap.split()[0] for gap in Table([]).gaps()}
    return Table(entry(name, family, CHECKS) for name in names for family in FAMILIES)


@pytest.mark.parametrize(
    ("parameters", "row"),
    [
        ({"name": "lora", "family": "t5"}, "lora"),
        ({"case": "bias-all", "family": "t5"}, "lora bias-all"),
        ({"family": "t5"}, "lora"),
        ({"family": "t5", "number": 3, "name": "lora-wide"}, "lora-wide"),
    ],
)
def test_a_row_is_named_after_the_test_s_parameters(parameters: dict[str, Any], row: str) -> None:
    found = entry_of(make_cell(method="lora", family="t5"), parameters)
    assert (found["method"], found["row"], found["family"]) == ("lora", row, "t5")


def test_a_cell_that_names_nothing_takes_all_from_the_parameters() -> None:
    cell = make_cell()
    cell.check("forward", lambda: None)
    cell.check("merged", lambda: 1 / 0)
    found = entry_of(cell, {"name": "dora", "family": "bert"})
    assert found == entry("dora", "bert", ["forward"], ["merged"])


def test_a_check_that_failed_once_has_failed() -> None:
    cells = [entry("lora", "t5", CHECKS), entry("lora", "t5", CHECKS[1:], ["forward"])]
    for table in (Table(cells), Table(reversed(cells))):
        assert table.passing() == len(CHECKS) - 1
        assert "!GMWR" in table.lines()[1]


def test_refusals_are_numbered_and_not_counted_as_passing() -> None:
    table = Table([entry("ia3", family, [*CHECKS[:2], *CHECKS[3:]], merged="it scales biases") for family in FAMILIES])
    assert (table.passing(), table.refusals()) == (20, 5)
    assert table.lines()[1].split() == ["ia3", *["FG-WR1"] * 5]
    assert table.lines()[-1] == "1  it scales biases"


def test_a_whole_table_may_only_grow() -> None:
    table = whole()
    count = table.passing()
    assert verdict(table, count) == ([], False)
    assert verdict(table, count + 1)[1]
    said, failed = verdict(table, count - 1)
    assert not failed
    assert f"to {count}" in said[0]


def test_a_missing_family_check_or_method_is_a_failure() -> None:
    for damage in (lambda rows: rows.pop("lora"), lambda rows: rows["lora"].pop("t5")):
        table = whole()
        damage(table.rows)
        table.methods = set(table.rows)
        said, failed = verdict(table, 0)
        assert failed
        assert "lora" in said[0]
    table = whole()
    del table.rows["lora"]["t5"]["merged"]
    assert table.gaps() == ["lora on t5: merged"]
    assert not set(WITHOUT_A_ROW) & set(table.rows)


@pytest.mark.parametrize(
    ("changes", "whole_run"),
    [
        ({}, True),
        ({"markexpr": "not slow"}, True),
        ({"keyword": "lora"}, False),
        ({"markexpr": "slow"}, False),
        ({"lf": True}, False),
        ({"deselect": ["x"]}, False),
        ({"args": [str(FOLDER / "test_table.py")]}, False),
        ({"args": [str(FOLDER.parent / "contract")]}, False),
        ({"args": [str(FOLDER.parent)]}, True),
    ],
)
def test_only_a_whole_run_is_judged(changes: dict[str, Any], whole_run: bool) -> None:
    values = {"keyword": "", "markexpr": "", "lf": False, "deselect": None, "maxfail": 0, "collectonly": False}
    arguments = changes.get("args", [str(FOLDER)])
    config: Any = SimpleNamespace(option=SimpleNamespace(**(values | changes)), args=arguments)
    assert bool(is_whole_run(config)) == whole_run
